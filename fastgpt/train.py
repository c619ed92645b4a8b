"""The training loop, read top to bottom: settings -> data -> model -> optimizer -> loop.

    fastgpt train --config tiny --data my.txt          (or: python -m fastgpt.train ...)

Copied out of the checkout it runs as it is against the installed package: `python train.py --data tokens.bin`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastgpt import backend, checkpoint
from fastgpt.config import TrainConfig, load_config, to_dict
from fastgpt.data import IGNORE, TokenLoader, sequential, unigram_nats
from fastgpt.data.source import open_source
from fastgpt.device import default_device, describe_machine, keep_freed_memory, memory_gb, peak_flops
from fastgpt.errors import UserError
from fastgpt.generate import generate
from fastgpt.model import GPT
from fastgpt.nn import keep_gradients
from fastgpt.optim import AdamW

WARM_STEPS = 3  # left out when speed is measured
MEASURED_STEPS = 12  # after these a run limited by minutes knows how many steps it will take
STOP_AFTER_SKIPS = 10  # steps in a row with a norm that is not finite


@dataclasses.dataclass
class Progress:
    """Where a run stands; part of every checkpoint."""

    step: int = 0  # optimizer steps done
    tokens: int = 0
    seconds: float = 0.0  # of training, evaluation and checkpoints left out
    last_step: int = 0  # the run's length; with max_minutes it is fixed after MEASURED_STEPS, until then an upper bound
    length_known: bool = True
    skipped: int = 0  # steps in a row whose gradient norm was not finite


def learning_rate(cfg: TrainConfig, step: int, last_step: int) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, then the schedule down to min_lr_ratio * lr at last_step."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    done = min(1.0, (step - cfg.warmup_steps) / max(1, last_step - cfg.warmup_steps))
    if cfg.schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * done))
    elif cfg.schedule == "linear":
        share = 1 - done
    elif cfg.schedule == "wsd":  # warm-up, stable, decay
        share = min(1.0, (1 - done) / cfg.decay_fraction) if cfg.decay_fraction > 0 else 1.0
    else:
        share = 1.0
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * share)


class Lagged:
    """Numbers that stay on the device until they have arrived by themselves: the loop never waits for the GPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.queue: deque[tuple[dict[str, Any], Tensor, Any]] = deque()

    def put(self, row: dict[str, Any], values: Tensor) -> None:
        host = torch.empty(values.shape, pin_memory=self.cuda)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event() if self.cuda else None
        if event is not None:
            event.record()
        self.queue.append((row, host, event))

    def ready(self, everything: bool = False) -> Iterator[tuple[dict[str, Any], list[float]]]:
        """Rows whose numbers are there, oldest first; `everything` waits for all."""
        while self.queue and (everything or self.queue[0][2] is None or self.queue[0][2].query()):
            row, host, event = self.queue.popleft()
            if event is not None:
                event.synchronize()
            yield row, host.tolist()


class Log:
    """What a person and a program see of a run: progress bar, a line every log_every steps, metrics.jsonl, loss.png."""

    def __init__(self, run: Path, progress: Progress, cfg: TrainConfig) -> None:
        self.path, self.cfg = run / "metrics.jsonl", cfg
        self._drop_after(progress.step)
        self.file = self.path.open("a", encoding="utf-8")
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=progress.last_step,
            initial=progress.step,
            unit="step",
            mininterval=0.1 if self.terminal else 15.0,  # in a log file a bar is a line each time
            dynamic_ncols=True,
        )

    def _drop_after(self, step: int) -> None:
        """A killed run may have logged steps that its checkpoint does not have: they will come again."""
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            aside = self.path.with_suffix(".tmp")
            aside.write_text("".join(kept), encoding="utf-8")
            aside.replace(self.path)

    def row(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def say(self, text: str) -> None:
        tqdm.write(text) if self.terminal else print(text, flush=True)

    def step(self, row: dict[str, Any], last_step: int) -> None:
        self.row(row)
        self.bar.total = last_step
        self.bar.update(1)
        self.bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tok/s", refresh=False)
        if row["step"] % self.cfg.log_every == 0 or row["step"] == last_step:
            self.say(
                f"step {row['step']:>6}/{last_step} | loss {row['loss']:.4f} | norm {row['grad_norm']:.3f} | "
                f"lr {row['lr']:.2e} | {row['tokens_per_second']:,.0f} tok/s | "
                f"mfu {row['mfu_causal']:.1%} causal, {row['mfu_full']:.1%} full | {row['memory_gb']:.2f} GB"
            )

    def close(self) -> None:
        self.bar.close()
        self.file.close()

    def plot(self) -> Path:
        """Loss curve of the whole run, resumes included, as loss.png."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        fig, ax = plt.subplots(figsize=(8, 4.5))
        train = [(r["step"], r["loss"]) for r in rows if "loss" in r]
        val = [(r["step"], r["val_loss"]) for r in rows if "val_loss" in r]
        for points, name, style in ((train, "training", "-"), (val, "validation", "o-")):
            ax.plot(*zip(*points), style, label=name, linewidth=1) if points else None
        ax.set(xlabel="step", ylabel="loss (nats per token)", title=str(self.path.parent))
        ax.grid(alpha=0.3)
        ax.legend()
        fig.tight_layout()
        fig.savefig(self.path.with_name("loss.png"), dpi=120)
        plt.close(fig)
        return self.path.with_name("loss.png")


def build_model(cfg: TrainConfig, vocab_size: int, device: torch.device) -> GPT:
    """A freshly initialised model: same seed, same weights, whatever the kernels and the device."""
    settings = dataclasses.replace(cfg.model, vocab_size=vocab_size)
    model = GPT(settings, generator=torch.Generator().manual_seed(cfg.seed))
    bf16 = cfg.dtype == "bf16" or (cfg.dtype == "auto" and device.type == "cuda")  # emulated bf16 crawls on most CPUs
    return model.to(device=device, dtype=torch.bfloat16 if bf16 else torch.float32)


def build_optimizer(cfg: TrainConfig, model: GPT) -> AdamW:
    return AdamW(
        model.param_groups(cfg.weight_decay),
        lr=cfg.lr,
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.eps,
        master=None if cfg.master == "none" else cfg.master,
        max_norm=cfg.clip if cfg.clip > 0 else math.inf,
        seed=cfg.seed,
    )


def evaluate(model: GPT, windows: Iterator[tuple[Tensor, Tensor]]) -> float:
    """Mean loss in nats per token over (ids, targets) batches."""
    model.eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for ids, targets in windows:
            total += float(model(ids, targets, reduction="sum"))
            tokens += int((targets != IGNORE).sum())
    model.train()
    return total / tokens


def train_step(model: Any, optimizer: AdamW, loader: TokenLoader, accumulation: int) -> Tensor:
    """One optimizer step over `accumulation` micro-batches; returns (loss, gradient norm) on the device."""
    loss = torch.zeros((), device=optimizer.device)
    for _ in range(accumulation):
        ids, targets = next(loader)
        part = model(ids, targets) / accumulation
        part.backward()
        loss += part.detach()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack((loss, optimizer.grad_norm[0]))


class Run:
    """One training run: everything that a checkpoint holds, and the folder it goes to."""

    def __init__(self, cfg: TrainConfig) -> None:
        self.cfg, self.folder = cfg, Path(cfg.out or "runs/train")
        self.device = default_device(cfg.device)
        torch.manual_seed(cfg.seed)
        self.data = open_source(
            cfg.data,
            val_data=cfg.val_data,
            tokenizer=cfg.tokenizer,
            vocab_size=cfg.vocab_size,
            val_fraction=cfg.val_fraction,
        )
        vocab = cfg.model.vocab_size or self.data.n_vocab
        if vocab < self.data.n_vocab:
            raise UserError(f"model.vocab_size is {vocab}, but {self.data.name} has {self.data.n_vocab} token ids")
        if len(self.data.val) < 2:
            raise UserError(f"{self.data.name} has {len(self.data.val)} validation tokens, expected at least 2")
        keep_freed_memory()
        self.model = build_model(cfg, vocab, self.device)
        keep_gradients(self.model)
        self.optimizer = build_optimizer(cfg, self.model)
        self.loader = TokenLoader(self.data.train, cfg.micro_batch, cfg.block_size, seed=cfg.seed, device=self.device)
        self.progress = Progress(last_step=cfg.max_steps, length_known=cfg.max_minutes is None)

    def save(self) -> Path:
        """Write a checkpoint of this moment."""
        state = {
            "progress": dataclasses.asdict(self.progress),
            "config": to_dict(self.cfg),
            "model": dataclasses.asdict(self.model.config),
            "loader": self.loader.state_dict(),
            "tokenizer": self.data.fingerprint,
        }
        extra = {**checkpoint.flatten_optimizer(self.optimizer), **checkpoint.random_states(self.device)}
        weights = self.model.state_dict()
        return checkpoint.save(self.folder, self.progress.step, weights, extra, state, self.cfg.keep)

    def resume(self) -> None:
        """Continue from the newest checkpoint of the run folder, or from cfg.resume; nothing to do in a new folder."""
        cfg = self.cfg
        if cfg.resume == "never" and checkpoint.checkpoints(self.folder):
            raise UserError(f"out: {self.folder} already holds a run; choose another --out, or delete that folder")
        if cfg.resume == "never" or (cfg.resume == "auto" and not checkpoint.checkpoints(self.folder)):
            return
        path = checkpoint.find(self.folder if cfg.resume == "auto" else cfg.resume)
        state = checkpoint.read_state(path)
        if state["tokenizer"] != self.data.fingerprint:
            raise UserError(f"checkpoint {path} was trained with another tokenizer than that of {self.data.name}")
        for name, value in dataclasses.asdict(self.model.config).items():
            if state["model"].get(name) != value:
                raise UserError(f"checkpoint {path} has model.{name} {state['model'].get(name)!r}, expected {value!r}")
        self.model.load_state_dict(checkpoint.read_tensors(path, checkpoint.MODEL, state))
        extra = checkpoint.read_tensors(path, checkpoint.OPTIMIZER, state)
        rng = {name: extra.pop(name) for name in list(extra) if name.startswith("rng.")}
        checkpoint.unflatten_optimizer(self.optimizer, extra)
        checkpoint.restore_random_states(rng, self.device)
        self.loader.load_state_dict(state["loader"])
        length = self.progress.last_step
        self.progress = Progress(**state["progress"])
        if self.progress.length_known and cfg.max_minutes is None:
            self.progress.last_step = length  # a longer max_steps goes on where the run stood

    def fix_length(self, measured: int) -> None:
        """With max_minutes: how many steps fit, from `measured` steps' speed. Fixed once: a resume repeats it."""
        p = self.progress
        fits = int(self.cfg.max_minutes * 60 * measured / p.seconds) if self.cfg.max_minutes else p.last_step
        p.last_step, p.length_known = max(p.step + 1, min(p.last_step, fits)), True

    def step(self, model: Any) -> Tensor:
        """One optimizer step, timed; its (loss, gradient norm) stay on the device."""
        p = self.progress
        rate = learning_rate(self.cfg, p.step, p.last_step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        values = train_step(model, self.optimizer, self.loader, self.cfg.accumulation)
        p.step += 1
        p.tokens += self.cfg.batch_tokens
        return values


class Stop:
    """Ctrl-C and SIGTERM end the run after the step under way, with a checkpoint; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def report(run: Run, log: Log, lagged: Lagged, everything: bool = False) -> None:
    """Write down the steps whose numbers have arrived; guard against gradients that stay NaN or infinite."""
    cfg, p = run.cfg, run.progress
    for row, (loss, norm) in lagged.ready(everything):
        row.update(loss=loss, grad_norm=norm)
        log.step(row, p.last_step)
        if math.isfinite(norm) and math.isfinite(loss):
            p.skipped = 0
            continue
        p.skipped += 1
        log.say(f"step {row['step']}: loss {loss}, gradient norm {norm}: the step was skipped")
        if p.skipped >= STOP_AFTER_SKIPS:
            good = checkpoint.checkpoints(run.folder)
            last = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
            raise UserError(
                f"training: {p.skipped} steps in a row had no finite gradient; {last}; try a lower lr than {cfg.lr}"
            )


def side_work(run: Run, log: Log) -> bool:
    """Evaluation, samples and checkpoints that are due after this step; whether there were any."""
    cfg, p = run.cfg, run.progress
    last = p.step >= p.last_step
    due = [
        bool(every) and p.step % every == 0 and not last for every in (cfg.eval_every, cfg.save_every, cfg.sample_every)
    ]
    if due[0]:
        validate(run, log, cfg.eval_batches)
    if due[1]:
        log.say(f"step {p.step}: checkpoint {run.save()}")
    if due[2]:
        log.say(sample(run, cfg.prompt))
    return any(due)


def loop(run: Run, model: Any, log: Log, stop: Stop) -> None:
    """Step until the run's length, the time budget or a signal ends it; evaluate and checkpoint on the way."""
    cfg, p, lagged = run.cfg, run.progress, Lagged(run.device)
    per_token = run.model.flops_per_token(cfg.block_size)
    peak, _ = peak_flops(run.device, next(run.model.parameters()).dtype)
    limit = math.inf if cfg.max_minutes is None else cfg.max_minutes * 60 * 1.1  # the machine may have slowed down
    started, clock = p.step, time.perf_counter()
    while p.step < p.last_step and not stop.asked and p.seconds < limit:
        values = run.step(model)
        now = time.perf_counter()
        seconds, clock = now - clock, now
        p.seconds += seconds if p.length_known or p.step - started > WARM_STEPS else 0.0
        row = {"step": p.step, "tokens": p.tokens, "lr": run.optimizer.param_groups[0]["lr"], "seconds": p.seconds}
        row["tokens_per_second"] = speed = cfg.batch_tokens / seconds
        row.update({f"mfu_{name}": flops * speed / peak for name, flops in per_token.items()})
        lagged.put({**row, "memory_gb": memory_gb(run.device)}, values)
        report(run, log, lagged)
        if not p.length_known and p.step - started >= MEASURED_STEPS:
            run.fix_length(p.step - started - WARM_STEPS)
        if side_work(run, log):
            clock = time.perf_counter()
    report(run, log, lagged, everything=True)


def validate(run: Run, log: Log, batches: int | None) -> float:
    """Validation loss over the first `batches` batches (all of them: None), into the log."""
    cfg = run.cfg
    windows = sequential(run.data.val, cfg.micro_batch, cfg.block_size, max_batches=batches, device=run.device)
    loss = evaluate(run.model, windows)
    log.row({"step": run.progress.step, "val_loss": loss})
    log.say(f"step {run.progress.step}: validation loss {loss:.4f} nats per token")
    return loss


def sample(run: Run, prompt: str) -> str:
    """Text that the model continues `prompt` with (its seed is the run's, so that a run repeats)."""
    cfg, tokenizer = run.cfg, run.data.tokenizer
    if tokenizer is None:
        return "no samples: these tokens came without a tokenizer (--tokenizer tokenizer.json)"
    run.model.eval()
    generator = torch.Generator(run.device).manual_seed(cfg.seed)
    ids = torch.tensor(tokenizer.encode(prompt).tolist(), dtype=torch.int64, device=run.device)[None]
    out = generate(run.model, ids, cfg.sample_tokens, temperature=0.8, top_k=50, eot=tokenizer.eot, generator=generator)
    run.model.train()
    return tokenizer.decode(out[0].tolist())


def finish(run: Run, log: Log) -> int:
    """Final validation against the unigram model, samples and loss curve; the exit code."""
    cfg = run.cfg
    loss = validate(run, log, None if run.device.type == "cuda" else 40 * cfg.eval_batches)
    unigram = unigram_nats(run.data.train, run.data.val, run.data.n_vocab)
    prompts = cfg.prompt.split("|") if run.data.tokenizer is not None else [cfg.prompt]
    texts = [sample(run, prompt) for prompt in prompts]
    (run.folder / "samples.txt").write_text("\n\n=====\n\n".join(texts), encoding="utf-8")
    for text in texts:
        log.say(f"--- sample ---\n{text}")
    log.say(f"loss curve: {log.plot()}; samples: {run.folder / 'samples.txt'}; metrics: {log.path}")
    log.say(f"validation loss {loss:.4f} nats per token, unigram model of the same tokens {unigram:.4f}")
    if cfg.check_baseline and loss > unigram - 1.0:
        log.say(f"the model is {unigram - loss:.2f} nats per token under the unigram model, expected at least 1")
        return 1
    return 0


def train(cfg: TrainConfig) -> int:
    """Train as `cfg` says; returns the exit code (1: too close to the unigram model, with check_baseline)."""
    backend.use(**backend.parse_choices(cfg.kernels))
    run = Run(cfg)
    run.resume()
    run.folder.mkdir(parents=True, exist_ok=True)
    dtype = next(run.model.parameters()).dtype
    kernels = {op: backend.explain(op, run.device.type, dtype) for op in backend.ops()}
    header = {"config": to_dict(cfg), "machine": describe_machine(run.device), "data": run.data.describe()}
    header["kernels"] = kernels
    (run.folder / "run.json").write_text(json.dumps(header, indent=1), encoding="utf-8")
    if run.data.tokenizer is not None:  # beside the checkpoints: a run folder is all that `fastgpt sample` needs
        run.data.tokenizer.save(run.folder / "tokenizer.json")
    log = Log(run.folder, run.progress, cfg)
    log.say(
        f"{run.folder}: {run.model.num_params():,} parameters, {run.data.describe()}, device {run.device}, "
        f"kernels {', '.join(f'{op} {picked}' for op, (picked, _) in kernels.items())}"
    )
    resumed = run.progress.step
    if resumed:
        log.say(f"resumed at step {resumed} of {run.progress.last_step}")
    stop = Stop()
    gc.freeze()
    try:
        loop(run, torch.compile(run.model) if cfg.compile else run.model, log, stop)
        if run.progress.step > resumed:
            log.say(f"step {run.progress.step}: checkpoint {run.save()}")
        if stop.asked:
            log.say(f"stopped at step {run.progress.step}; to continue: the same command again")
            return 0
        return finish(run, log)
    finally:
        log.close()
        stop.restore()


def main(argv: list[str] | None = None) -> int:
    """`fastgpt train`: settings from `argv` (default: the command line); without --config, what suits the machine."""
    default = "gpt2-124m-demo" if torch.cuda.is_available() else "tiny"
    return train(load_config(sys.argv[1:] if argv is None else argv, default))


if __name__ == "__main__":
    from fastgpt.cli import run_command

    sys.exit(run_command(main))
