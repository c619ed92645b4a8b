"""The training loop, read top to bottom: settings -> data -> model -> optimizer -> loop.

    fastgpt train --config tiny --data my.txt          (or: python -m fastgpt.train ...)

Copied out of the checkout it runs as it is against the installed package: `python train.py --data tokens.bin`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.core import backend
from fastgpt.core.device import (
    default_device,
    describe_machine,
    dtype_of,
    energy_joules,
    keep_freed_memory,
    memory_gb,
    peak_flops,
)
from fastgpt.core.errors import UserError
from fastgpt.data import IGNORE, TokenLoader, sequential, unigram_nats
from fastgpt.data.shards import Tokens
from fastgpt.data.source import open_source, open_validation
from fastgpt.inference.generate import generate
from fastgpt.models.gpt import GPT
from fastgpt.nn import keep_gradients
from fastgpt.optim import AdamW
from fastgpt.optim.muon import MuonAdamW
from fastgpt.training import checkpoint, plan
from fastgpt.training.config import TrainConfig, load_config, to_dict
from fastgpt.training.graphs import Graphs, call
from fastgpt.training.profiling import Profile
from fastgpt.training.runlog import AHEAD, Lagged, Log, Pace

# name -> evaluation(run): figures by name, taken at every validation and logged as "name.figure"; a script of one's own
# puts functions here before it calls main(). The model is in training mode when they are called, and must be after.
EVALUATIONS: dict[str, Callable[[Run], dict[str, float]]] = {}
WARM_STEPS = 6  # left out when speed is measured; graphs are recorded in the fourth
MEASURED_STEPS = 15  # after these a run limited by minutes knows how many steps it will take
STOP_AFTER_SKIPS = 10  # steps in a row that the guard skipped
SPIKE_HORIZON = 100  # steps that a loss is compared with
GROW_AFTER = 2000  # steps without overflow before fp16's loss scale is doubled


@dataclasses.dataclass
class Progress:
    """Where a run stands; part of every checkpoint."""

    step: int = 0  # optimizer steps done
    tokens: int = 0
    seconds: float = 0.0  # of training, evaluation and checkpoints left out
    last_step: int = 0  # the run's length; with max_minutes it is fixed after MEASURED_STEPS, until then an upper bound
    length_known: bool = True
    skipped: int = 0  # steps in a row that the guard skipped
    best_loss: float | None = None  # of the validations so far
    best_step: int = -1
    waited: int = 0  # validations since then
    ended: bool = False  # by patience


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


def build_model(cfg: TrainConfig, vocab_size: int, device: torch.device) -> GPT:
    """A freshly initialised model: same seed, same weights, whatever the kernels and the device."""
    settings = dataclasses.replace(cfg.model, vocab_size=vocab_size)
    model = GPT(settings, generator=torch.Generator().manual_seed(cfg.seed))
    model.recompute = cfg.recompute
    model.to(device=device, dtype=dtype_of(cfg.dtype, device.type))
    if not cfg.compile and (cfg.accumulation > 1 or cfg.model.tied):  # where more than one gradient meets in a step
        keep_gradients(model if cfg.accumulation > 1 else model.wte)
    return model


def build_optimizer(cfg: TrainConfig, model: GPT) -> AdamW | MuonAdamW:
    try:
        groups = model.param_groups(cfg.weight_decay, cfg.lr_ratios, muon=cfg.optimizer == "muon")
    except ValueError as e:
        raise UserError(str(e)) from e
    settings: dict[str, Any] = dict(
        lr=cfg.lr,
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.eps,
        master=None if cfg.master == "none" else cfg.master,
        max_norm=cfg.clip if cfg.clip > 0 else math.inf,
        seed=cfg.seed,
    )
    return (
        MuonAdamW(groups, momentum=cfg.momentum, **settings) if cfg.optimizer == "muon" else AdamW(groups, **settings)
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


class SpikeGuard:
    """Tells, on the device, a loss that is `sigmas` standard deviations over the mean of the last steps'.

    Mean and variance are exponential over SPIKE_HORIZON steps, and nothing is a spike before as many were seen. A spike
    moves neither.
    """

    def __init__(self, sigmas: float, device: torch.device) -> None:
        self.sigmas = sigmas
        self.state = torch.zeros(3, device=device)  # mean, variance, steps

    def __call__(self, loss: Tensor) -> Tensor:
        """1 if this step's loss, (1,) fp32, is a spike, else 0; (1,) fp32."""
        mean, variance, steps = self.state.split(1)
        spike = (steps >= SPIKE_HORIZON) & (loss > mean + self.sigmas * variance.sqrt())
        rate = 1 / (steps + 1).clamp(max=SPIKE_HORIZON)
        away = loss - mean
        after = torch.cat((mean + rate * away, (1 - rate) * (variance + rate * away * away), steps + 1))
        self.state.copy_(torch.where(spike | ~loss.isfinite(), self.state, after))
        return spike.float()


class LossScale:
    """fp16's loss scale, on the device: halved by a step whose gradients overflow, doubled after GROW_AFTER others."""

    def __init__(self, device: torch.device) -> None:
        self.state = torch.tensor([65536.0, 0.0], device=device)  # scale, steps since it changed

    @property
    def scale(self) -> Tensor:
        return self.state[:1]

    def update(self, norm: Tensor) -> None:
        """norm: (1,) of the step's gradients."""
        scale, steps = self.state.split(1)
        grow = steps + 1 >= GROW_AFTER
        good = torch.cat((torch.where(grow, 2 * scale, scale), torch.where(grow, 0.0, steps + 1)))
        bad = torch.cat(((scale / 2).clamp(min=1.0), torch.zeros_like(steps)))
        self.state.copy_(torch.where(norm.isfinite(), good, bad))


def train_step(
    model: Any,
    optimizer: AdamW | MuonAdamW,
    loader: Iterator[tuple[Tensor, Tensor]],
    accumulation: int,
    guard: SpikeGuard | None = None,
    scaling: LossScale | None = None,
    graphs: Graphs | None = None,
) -> Tensor:
    """One optimizer step over `accumulation` micro-batches; (loss, gradient norm, whether it was a spike), on the
    device. The loss is the mean over all counted tokens of the step, however they fall into micro-batches."""

    def micro_step(total: Tensor, ids: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        part = model(ids, targets, reduction="sum") / counted
        (part if scaling is None else part * scaling.scale).backward()
        return total + part.detach()

    def update(loss: Tensor) -> Tensor:
        spike = torch.zeros_like(loss) if guard is None else guard(loss)
        optimizer.found_inf = spike  # a step that is flagged changes nothing
        if scaling is not None:
            assert isinstance(optimizer, AdamW), "the settings take fp16 with AdamW only"
            optimizer.grad_scale = scaling.scale
        optimizer.step()
        if scaling is not None:
            scaling.update(optimizer.grad_norm)
        optimizer.zero_grad(set_to_none=True)
        return torch.cat((loss, optimizer.grad_norm, spike))

    do = call
    if graphs is not None:
        assert isinstance(optimizer, AdamW), "Muon waits for the device"
        optimizer.refresh_lr()
        graphs.begin()
        do = graphs
    batches = [next(loader) for _ in range(accumulation)]
    loss, none = torch.zeros(1, device=optimizer.device), torch.zeros((), dtype=torch.int64, device=optimizer.device)
    counted = sum(((targets != IGNORE).sum() for _, targets in batches), none)
    for i, (ids, targets) in enumerate(batches):  # the first writes gradients, the others add to them
        loss = do("accumulate" if i else "micro_step", micro_step, loss, ids, targets, counted)
    return do("update", update, loss)


class Run:
    """One training run: everything that a checkpoint holds, and the folder it goes to."""

    def __init__(self, cfg: TrainConfig) -> None:
        self.cfg, self.folder = cfg, Path(cfg.out or "runs/train")
        self.device = default_device(cfg.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(
                self.device
            )  # what takes no device (events, streams, kernels of others) is on it, too
        torch.manual_seed(cfg.seed)
        self.data = open_source(
            cfg.data,
            data_dtype=cfg.data_dtype,
            val_data=cfg.val_data,
            tokenizer=cfg.tokenizer,
            vocab_size=cfg.vocab_size,
            val_fraction=cfg.val_fraction,
        )
        vocab = cfg.model.vocab_size or self.data.n_vocab
        if vocab < self.data.n_ids:
            raise UserError(f"model.vocab_size is {vocab}, but {self.data.name} has {self.data.n_ids} token ids")
        if cfg.model.vocab_size is not None:
            self.data = dataclasses.replace(self.data, n_vocab=min(vocab, self.data.n_vocab), said="")
        if len(self.data.val) < 2:
            raise UserError(f"{self.data.name} has {len(self.data.val)} validation tokens, expected at least 2")
        self.val_sources = open_validation(cfg.val_sources, self.data, cfg.data_dtype)
        self.cfg = cfg = plan.settle(cfg, vocab, self.device)
        keep_freed_memory()
        with plan.explain_out_of_memory(cfg, vocab, self.device):
            self.model = build_model(cfg, vocab, self.device)
            self.optimizer = build_optimizer(cfg, self.model)
        self.loader = TokenLoader(self.data.train, cfg.sequences, cfg.block_size, seed=cfg.seed, device=self.device)
        self.guard = SpikeGuard(cfg.spike_sigmas, self.device) if cfg.spike_sigmas > 0 else None
        self.scaling = LossScale(self.device) if cfg.dtype == "fp16" else None
        self.progress = Progress(last_step=cfg.most_steps, length_known=cfg.max_minutes is None)
        self.writer = checkpoint.Writer()
        self.graphs: Graphs | None = None
        if cfg.graphs and self.device.type == "cuda" and cfg.optimizer == "adamw":
            stream = torch.cuda.Stream(self.device)  # captures must not be on the default one
            stream.wait_stream(torch.cuda.current_stream(self.device))
            torch.cuda.set_stream(stream)
            self.graphs = Graphs(self.model)
        self.rate = 0.0  # the last step's learning rate

    def device_parts(self) -> list[tuple[str, SpikeGuard | LossScale]]:
        """What steers the run from the device and is part of its checkpoints."""
        parts: list[tuple[str, SpikeGuard | LossScale | None]] = [("guard", self.guard), ("scaling", self.scaling)]
        return [(name, part) for name, part in parts if part is not None]

    def save(self) -> None:
        """Begin to write a checkpoint of this moment; `writer` says when it is there."""
        state = {
            "progress": dataclasses.asdict(self.progress),
            "config": to_dict(self.cfg),
            "model": dataclasses.asdict(self.model.config),
            "loader": self.loader.state_dict(),
            "tokenizer": self.data.fingerprint,
        }
        moments = checkpoint.flatten_optimizer(self.optimizer, self.model.named_parameters())
        extra = {**moments, **checkpoint.random_states(self.device)}
        extra.update({name: part.state for name, part in self.device_parts()})
        cfg, step = self.cfg, self.progress.step
        stays = {self.progress.best_step} if cfg.patience else set()
        stays |= set(range(0, step, cfg.keep_every)) if cfg.keep_every else set()
        self.writer.save(self.folder, step, self.model.state_dict(), extra, state, cfg.keep, stays)

    def resume(self) -> list[str]:
        """Continue from the newest checkpoint of the run folder, or from cfg.resume; nothing to do in a new folder.

        Returns the settings that are others than the checkpoint's, each with what it was and is: they count from here.
        """
        cfg = self.cfg
        if cfg.resume == "never" and checkpoint.checkpoints(self.folder):
            raise UserError(f"out: {self.folder} already holds a run; choose another --out, or delete that folder")
        if cfg.resume == "never" or (cfg.resume == "auto" and not checkpoint.checkpoints(self.folder)):
            return []
        path = checkpoint.find(self.folder if cfg.resume == "auto" else cfg.resume)
        state = checkpoint.read_state(path)
        if state["tokenizer"] != self.data.fingerprint:
            raise UserError(f"checkpoint {path} was trained with another tokenizer than that of {self.data.name}")
        for name, value in dataclasses.asdict(self.model.config).items():
            if state["model"].get(name) != value:
                raise UserError(f"checkpoint {path} has model.{name} {state['model'].get(name)!r}, expected {value!r}")
        fixed = ("optimizer", "lr_ratios") if state["format"] == 1 else ("optimizer",)  # 1: groups give the order
        for name in fixed:
            if state["config"].get(name) != (value := to_dict(cfg)[name]):
                raise UserError(f"checkpoint {path} has {name} {state['config'].get(name)!r}, expected {value!r}")
        self.model.load_state_dict(checkpoint.read_tensors(path, checkpoint.MODEL, state))
        extra = checkpoint.read_tensors(path, checkpoint.OPTIMIZER, state)
        rng = {name: extra.pop(name) for name in list(extra) if name.startswith("rng.")}
        seen: dict[str, Tensor] = {name: extra.pop(name) for name in ("guard", "scaling") if name in extra}
        for name, part in self.device_parts():
            part.state.copy_(seen.get(name, part.state))
        checkpoint.unflatten_optimizer(self.optimizer, extra, self.model.named_parameters())
        checkpoint.restore_random_states(rng, self.device)
        self.loader.load_state_dict(state["loader"])
        self.progress = p = Progress(**state["progress"])
        before, now = state["config"], to_dict(cfg)
        if not (p.ended and cfg.patience):  # a longer max_steps goes on where the run stood
            if cfg.max_minutes is None:
                p.last_step, p.length_known = cfg.most_steps, True
            elif any(before.get(k) != now[k] for k in ("max_minutes", "max_steps")):
                p.last_step, p.length_known = cfg.most_steps, False
        others = [k for k in now if before.get(k, now[k]) != now[k] and k not in ("model", "resume", "out")]
        return [f"{key} {before[key]!r} -> {now[key]!r}" for key in others]

    def ends(self) -> str:
        """What ends the run, in words."""
        p, minutes = self.progress, self.cfg.max_minutes
        if p.length_known or minutes is None:
            return f"the run ends with step {p.last_step}"
        steps = "" if self.cfg.max_steps is None else f" or with step {p.last_step} (max_steps), whichever is first"
        return f"the run ends after {minutes:g} minutes (max_minutes){steps}"

    def fix_length(self, step: int, seconds: float) -> str:
        """With max_minutes, after `step`: how many steps fit if each takes `seconds`, in words. Fixed once: a resume
        repeats it."""
        p, minutes = self.progress, self.cfg.max_minutes
        assert minutes is not None
        fits = step + int((60 * minutes - p.seconds) / seconds)
        limit = "max_steps" if p.last_step <= fits else f"max_minutes {minutes:g} at {seconds:.3g} s a step"
        p.last_step, p.length_known = max(p.step + 1, min(p.last_step, fits)), True
        return f"the run ends with step {p.last_step} ({limit})"

    def speed(self, seconds: float) -> dict[str, float]:
        """Figures of a step that took `seconds`."""
        speed = self.cfg.batch_tokens / seconds
        peak, _ = peak_flops(self.device, next(self.model.parameters()).dtype)
        flops = self.model.flops_per_token(self.cfg.block_size)
        return {"tokens_per_second": speed, **{f"mfu_{name}": f * speed / peak for name, f in flops.items()}}

    def step(self, model: Any) -> Tensor:
        """One optimizer step; its (loss, gradient norm, whether it was a spike) stay on the device."""
        p = self.progress
        self.rate = learning_rate(self.cfg, p.step, p.last_step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * group["lr_ratio"]
        settings = (self.cfg.accumulation, self.guard, self.scaling, self.graphs)
        values = train_step(model, self.optimizer, self.loader, *settings)
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


def name_checkpoints(run: Run, log: Log, wait: bool = False) -> None:
    """Say which checkpoints have been written since the last call."""
    for path in run.writer.finished(wait):
        log.say(f"checkpoint {path}")


def report(run: Run, log: Log, lagged: Lagged, pace: Pace, wait: bool = False) -> None:
    """Write down the steps whose numbers have arrived (wait: all of them), and end a run that is skipped on and on."""
    cfg, p = run.cfg, run.progress
    arrived = list(lagged.ready(0 if wait else AHEAD))
    seconds = pace.step(len(arrived)) if arrived else 0.0
    for row, (loss, norm, spike) in arrived:
        p.seconds += seconds if p.length_known or pace.steps > WARM_STEPS else 0.0
        row.update(loss=loss, grad_norm=norm, seconds=p.seconds, **run.speed(seconds))
        log.step(row, p.last_step)
        if not p.length_known and pace.steps >= MEASURED_STEPS:
            log.say(run.fix_length(int(row["step"]), pace.seconds / (pace.steps - WARM_STEPS)))
        if math.isfinite(norm) and math.isfinite(loss) and not spike:
            p.skipped = 0
            continue
        p.skipped += 1
        why = f"more than {cfg.spike_sigmas:g} standard deviations (spike_sigmas) over the last steps'" if spike else ""
        log.say(f"step {row['step']}: loss {loss:.4f}, gradient norm {norm:.3g}: the step was skipped {why}".rstrip())
        if p.skipped >= STOP_AFTER_SKIPS:
            good = checkpoint.checkpoints(run.folder)
            last = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
            raise UserError(
                f"training: {p.skipped} steps in a row were skipped, the last with loss {loss:.4g} and gradient norm "
                f"{norm:.3g}; {last}; try a lower lr than {cfg.lr}"
            )


def due(run: Run) -> list[bool]:
    """Whether evaluation, a checkpoint, samples are due after this step."""
    cfg, p = run.cfg, run.progress
    every = (cfg.eval_every, cfg.save_every, cfg.sample_every)
    return [n > 0 and p.step % n == 0 and p.step < p.last_step for n in every]


def side_work(run: Run, log: Log, evaluates: bool, saves: bool, samples: bool) -> None:
    """Evaluation, checkpoint and samples that are due."""
    cfg = run.cfg
    if evaluates:
        best = judge(run, log, validate(run, log, cfg.eval_batches))
        saves = saves or (best and cfg.patience > 0)
    if saves:
        run.save()
    if samples:
        log.say(sample(run, cfg.prompt))


def judge(run: Run, log: Log, loss: float) -> bool:
    """Whether this is the best validation loss so far; after `patience` others the run ends."""
    cfg, p = run.cfg, run.progress
    if p.best_loss is None or loss < p.best_loss:
        p.best_loss, p.best_step, p.waited = loss, p.step, 0
        return True
    p.waited += 1
    if 0 < cfg.patience <= p.waited:
        p.last_step, p.ended = p.step, True
        log.say(f"stopping: {p.waited} validations without a better loss than {p.best_loss:.4f} at step {p.best_step}")
    return False


def loop(run: Run, model: Any, log: Log, stop: Stop) -> None:
    """Step until the run's length, the time budget or a signal ends it; evaluate and checkpoint on the way.

    The host launches steps ahead of the device, at most AHEAD of them; time is taken when their numbers arrive.
    """
    cfg, p, lagged = run.cfg, run.progress, Lagged(run.device)
    limit = math.inf if cfg.max_minutes is None else cfg.max_minutes * 60 * 1.1  # the machine may have slowed down
    profile = Profile(cfg.profile, cfg.profiler, run.folder, run.device)
    pace = Pace(WARM_STEPS)
    while p.step < p.last_step and not stop.asked and p.seconds < limit:
        profile.before(p.step + 1)
        values = run.step(model)
        if run.graphs is not None and run.graphs.failure:
            log.say(
                f"graphs: a step could not be recorded, so its kernels are launched one by one ({run.graphs.failure})"
            )
            run.graphs = None
        if wrote := profile.after(p.step):
            log.say(wrote)
        row = {"step": p.step, "tokens": p.tokens, "lr": run.rate, "memory_gb": memory_gb(run.device)}
        lagged.put(row, values)
        name_checkpoints(run, log)
        report(run, log, lagged, pace)
        if any(work := due(run)):
            report(run, log, lagged, pace, wait=True)
            side_work(run, log, *work)
            pace.restart()
    report(run, log, lagged, pace, wait=True)
    name_checkpoints(run, log, wait=True)
    if p.seconds >= limit:
        log.say(f"the run ends with step {p.step} of {p.last_step}: steps have become slower (max_minutes)")
    if wrote := profile.close():
        log.say(wrote)


def name_energy(run: Run, log: Log, before: float | None, seconds: float, steps: int) -> None:
    """Say what the GPU took since its counter stood at `before`, evaluations and checkpoints between steps included."""
    after = energy_joules(run.device)
    if before is None or after is None or steps == 0:
        return
    joules, tokens = after - before, steps * run.cfg.batch_tokens
    log.row({"step": run.progress.step, "joules": joules, "watts": joules / seconds})
    log.say(
        f"energy: {joules / 3.6e6:.4g} kWh in {steps} steps, {joules / seconds:.0f} W on average, "
        f"{1e3 * joules / tokens:.4g} mJ a token"
    )


def validate(run: Run, log: Log, batches: int | None) -> float:
    """Validation loss over the first `batches` batches (all of them: None), into the log."""
    cfg = run.cfg

    def loss_on(tokens: Tokens) -> float:
        windows = sequential(tokens, cfg.sequences, cfg.block_size, max_batches=batches, device=run.device)
        return evaluate(run.model, windows)

    loss = loss_on(run.data.val)
    row = {"step": run.progress.step, "val_loss": loss}
    row.update({f"val_loss.{name}": loss_on(tokens) for name, tokens in run.val_sources.items()})
    for name, evaluation in EVALUATIONS.items():
        row.update({f"{name}.{what}": float(value) for what, value in evaluation(run).items()})
    log.row(row)
    more = "".join(f", {name} {value:.4f}" for name, value in list(row.items())[2:])
    log.say(f"step {run.progress.step}: validation loss {loss:.4f} nats per token{more}")
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


def train(cfg: TrainConfig, command: str = "the same again") -> int:
    """Train as `cfg` says; returns the exit code (1: too close to the unigram model, with check_baseline). `command` is
    what a person who stopped the run is told to continue it with."""
    backend.use(**backend.parse_choices(cfg.kernels))
    run = Run(cfg)
    cfg = run.cfg  # with a number for micro_batch
    changed = run.resume()
    run.folder.mkdir(parents=True, exist_ok=True)
    dtype = next(run.model.parameters()).dtype
    kernels = {op: backend.explain(op, run.device.type, dtype) for op in backend.ops()}
    header = {"config": to_dict(cfg), "machine": describe_machine(run.device), "data": run.data.describe()}
    header["kernels"] = kernels
    (run.folder / "run.json").write_text(json.dumps(header, indent=1), encoding="utf-8")
    if run.data.tokenizer is not None:  # beside the checkpoints: a run folder is all that `fastgpt sample` needs
        run.data.tokenizer.save(run.folder / "tokenizer.json")
    log = Log(run.folder, cfg, run.progress.step, run.progress.last_step)
    log.say(
        f"{run.folder}: {run.model.num_params():,} parameters, {run.data.describe()}, device {run.device}, "
        f"kernels {', '.join(f'{op} {picked}' for op, (picked, _) in kernels.items())}"
    )
    resumed = run.progress.step
    if resumed:
        length = f" of {run.progress.last_step}" if run.progress.length_known else ""
        log.say(
            f"resumed at step {resumed}{length}" + (f"; changed since then: {', '.join(changed)}" if changed else "")
        )
    log.say(run.ends())
    stop = Stop()
    gc.freeze()
    joules, clock = energy_joules(run.device), time.perf_counter()
    try:
        with plan.explain_out_of_memory(cfg, run.model.vocab_size, run.device):
            loop(run, torch.compile(run.model) if cfg.compile else run.model, log, stop)
        name_energy(run, log, joules, time.perf_counter() - clock, run.progress.step - resumed)
        if run.progress.step > resumed:
            run.save()
            name_checkpoints(run, log, wait=True)
        if stop.asked:
            log.say(f"stopped at step {run.progress.step}; to continue: {command}")
            return 0
        return finish(run, log)
    finally:
        log.close()
        stop.restore()


def main(argv: list[str] | None = None) -> int:
    """`fastgpt train`: settings from `argv` (default: the command line); without --config, what suits the machine."""
    default = "gpt2-124m-demo" if torch.cuda.is_available() else "tiny"
    arguments = sys.argv[1:] if argv is None else argv
    if "--plan" in arguments:
        return plan.main(arguments, default)
    cfg = load_config(arguments, default)
    program = ["python", sys.argv[0]] if __name__ == "__main__" and __spec__ is None else ["fastgpt", "train"]
    again = [] if cfg.resume == "auto" else ["--resume", "auto"]
    return train(cfg, shlex.join([*program, *arguments, *again]))


if __name__ == "__main__":
    from fastgpt.core.command import run_command

    sys.exit(run_command(main))
