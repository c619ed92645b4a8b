"""Fine-tuning against transformers + TRL + PEFT: `fastgpt bench finetune --json FILE`.

A GPT-2 124M and a Llama of 125M parameters with random weights in fp32 on a CPU, the same number of threads for both
sides. A step is forward, backward, clipping and AdamW:

    sft   all weights, 2 rows of 512 tokens that all count; TRL's SFTTrainer
    lora  adapters of rank 16 in all linear layers of the blocks, the same rows; SFTTrainer with PEFT
    dpo   all weights, 2 pairs, sides of 512 tokens of which 256 count; DPOTrainer; the reference is computed before,
          on both sides (precompute_ref_log_probs). fastgpt and TRL also run with the activations of the blocks
          recomputed ("recompute"; gradient checkpointing in TRL)
    distil  all weights, the forward KL divergence from a teacher of the same shape at 2 rows of 512 tokens; for TRL
          the loss of GKDTrainer on the models of transformers, with PyTorch's AdamW. A further side ("no-loss") runs
          both models without heads, so that the memory of the loss itself is known

Each side runs in a separate process; in every round each does one step, while the others wait. Ratios are medians over
the rounds against TRL; above 1 is faster. Memory: the peak resident memory of the process in its steps after the first,
beyond what it had before it built the model. TRL's trainer runs its own training_step and its optimizer, without bf16
and, unless named so, without gradient checkpointing. --quick: tiny models, for trying this program.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from fastgpt.bench._harness import Samples, append_rows, provenance, resident_mb, turns, where
from fastgpt.bench.variants import Apart, reason
from fastgpt.core.command import Parser, number, run_command
from fastgpt.data import IGNORE
from fastgpt.data.batch import Batch
from fastgpt.data.tokenizer import available_cores, train_tokenizer
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.training.task import NextToken

SIDES = {
    "sft": ("fastgpt", "trl"),
    "lora": ("fastgpt", "trl"),
    "dpo": ("fastgpt", "fastgpt-recompute", "trl", "trl-recompute"),
    "distil": ("fastgpt", "fastgpt-no-loss", "trl"),
}
PACKAGES = ("transformers", "trl", "peft")
IMPORTS = {
    "fastgpt": ("fastgpt.train", "fastgpt.finetune.distil", "fastgpt.finetune.preference"),
    "trl": ("datasets", "trl", "peft"),
}
RANK = 16
LR = 1e-5
STEPS = 8  # different batches


@dataclass(frozen=True)
class Shape:
    """A model, and what a step has: rows of `block` tokens, or as many pairs of such sides, half of them a prompt."""

    layers: int
    heads: int
    width: int
    vocab: int
    block: int
    llama: bool = False
    rows: int = 2

    def config(self) -> ModelConfig:
        kind: dict[str, Any] = {}
        if self.llama:
            kind = dict(norm="rms", activation="swiglu", positions="rope", tied=False, qkv_bias=False, proj_bias=False)
            kind |= dict(mlp_bias=False, mlp_width=2048 if self.width == 768 else None)
        sizes: dict[str, Any] = dict(n_layers=self.layers, n_heads=self.heads, width=self.width)
        return ModelConfig(**sizes, **kind, vocab_size=self.vocab, vocab_multiple=1, block_size=self.block)

    def ids(self, step: int) -> torch.Tensor:
        """Return the ids of a step, (rows, block)."""
        generator = torch.Generator().manual_seed(step)
        return torch.randint(2, self.vocab, (self.rows, self.block), generator=generator)


SHAPES = {
    "gpt2-124m": Shape(12, 12, 768, 50257, 512),
    "llama-125m": Shape(12, 12, 768, 32000, 512, llama=True),
    "tiny": Shape(2, 2, 32, 300, 32),
    "tiny-llama": Shape(2, 2, 32, 300, 32, llama=True),
}


@dataclass(frozen=True)
class Setup:
    """What a process needs."""

    shape: Shape
    kind: str
    folder: Path
    threads: int
    side: str


def own_step(setup: Setup) -> Callable[[int], float]:
    """Return fastgpt's step: number -> loss."""
    from fastgpt.finetune.distil import Distil
    from fastgpt.finetune.lora import Lora, add_lora
    from fastgpt.finetune.preference import DPO
    from fastgpt.finetune.teacher import GPTTeacher
    from fastgpt.models.weights import load_pretrained
    from fastgpt.optim import AdamW
    from fastgpt.train import forward_backward, optimizer_step
    from fastgpt.training.build import keep_sums

    model, shape = load_pretrained(setup.folder / "hf"), setup.shape
    if setup.kind == "lora":
        add_lora(model, Lora(RANK, 2.0 * RANK), generator=torch.Generator().manual_seed(0))
    model.recompute = "block" if setup.side.endswith("recompute") else "none"
    keep_sums(model.train(), 1)
    optimizer = AdamW(model.param_groups(0.0), lr=LR, max_norm=1.0)
    task: Any = NextToken()
    if setup.kind == "distil":
        teacher = GPTTeacher(load_pretrained(setup.folder / "teacher"))
        task = NoLoss(teacher) if setup.side.endswith("no-loss") else Distil(teacher, ce=0.0)
    if setup.kind == "dpo":
        task = DPO()
        with torch.no_grad():
            task.reference = torch.cat([task.policy(model, pairs(shape, step, 0)) for step in range(STEPS)])

    def step(number: int) -> float:
        ids = shape.ids(number % STEPS)
        batch = Batch(ids[:, :-1], ids[:, 1:]) if setup.kind != "dpo" else pairs(shape, number % STEPS)
        loss = forward_backward(model, task, None, None, task.counted(batch), *batch.parts())
        return float(optimizer_step(optimizer, None, None, loss)[0])

    return step


class NoLoss(NextToken):
    """What a step of distillation does apart from both heads and the loss. A head with weights of its own has a
    gradient and moments here too, which are no part of the loss."""

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        loss = (model.hidden(batch.ids) * self.teacher.hidden(batch).view(*batch.ids.shape, -1)).sum().view(1)
        return loss if model.config.tied else loss + 0.0 * model.head.weight[0, 0]


def pairs(shape: Shape, step: int, index: int | None = None) -> Batch:
    """Return the batch of a step's pairs: each row is a side, and both sides of a pair have the same prompt."""
    half, n = shape.block // 2, 2 * shape.rows
    ids = torch.cat([shape.ids(step), shape.ids(STEPS + step)]).view(2, shape.rows, -1).transpose(0, 1).reshape(n, -1)
    ids[1::2, :half] = ids[::2, :half]
    place = torch.arange(shape.block)
    targets = torch.where((place >= half - 1) & (place < shape.block - 1), ids.roll(-1, 1), IGNORE)
    sequence = torch.arange(n)[:, None].expand_as(ids).contiguous()
    first = step * shape.rows if index is None else index
    extra = {"sequence": sequence, "index": first + torch.arange(shape.rows)}
    return Batch(ids, targets, sequence.int(), place.expand_as(ids).contiguous(), extra)


def trl_step(setup: Setup) -> Callable[[int], float]:
    """Return TRL's step: number -> loss."""
    import datasets
    import transformers
    import trl

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(setup.folder / "hf", dtype=torch.float32)
    if setup.kind == "distil":
        return gkd_step(setup, model)
    file = str(setup.folder / "tokenizer.json")
    words = transformers.PreTrainedTokenizerFast(tokenizer_file=file, eos_token="<|endoftext|>", pad_token="!")
    shape = setup.shape
    common: dict[str, Any] = dict(output_dir=str(setup.folder / "out"), bf16=False, use_cpu=True, report_to=[])
    common |= dict(
        gradient_checkpointing=setup.side.endswith("recompute"),
        per_device_train_batch_size=shape.rows,
        learning_rate=LR,
    )
    common |= dict(max_length=shape.block, lr_scheduler_type="constant", dataloader_num_workers=0, disable_tqdm=True)
    if setup.kind == "dpo":
        half = shape.block // 2
        rows = [row.tolist() for step in range(STEPS) for row in pairs(shape, step).ids]
        data = datasets.Dataset.from_dict({name: [name] for name in ("prompt", "chosen", "rejected")})
        args: Any = trl.DPOConfig(**common, precompute_ref_log_probs=True)
        trainer: Any = trl.DPOTrainer(model, args=args, train_dataset=data, processing_class=words)
        made: list[Any] = [
            {"prompt_ids": chosen[:half], "chosen_ids": chosen[half:], "rejected_ids": rejected[half:]}
            for chosen, rejected in zip(rows[::2], rows[1::2])
        ]
        batches = [trainer.data_collator(made[i * shape.rows : (i + 1) * shape.rows]) for i in range(STEPS)]
        with torch.no_grad():
            for batch in batches:
                chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
                batch |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    else:
        rows = [row.tolist() for step in range(STEPS) for row in shape.ids(step)]
        data = datasets.Dataset.from_dict({"input_ids": rows})
        extra: dict[str, Any] = {}
        if setup.kind == "lora":
            import peft

            layers: dict[str, Any] = dict(
                r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            extra["peft_config"] = peft.LoraConfig(**layers)
        args = trl.SFTConfig(**common, dataset_kwargs={"skip_prepare_dataset": True})
        trainer = trl.SFTTrainer(model, args=args, train_dataset=data, processing_class=words, **extra)
        made = [{"input_ids": row} for row in rows]
        batches = [trainer.data_collator(made[i * shape.rows : (i + 1) * shape.rows]) for i in range(STEPS)]
    trainer.create_optimizer()
    trainer.model_wrapped = trainer.model
    trainer.current_gradient_accumulation_steps = 1

    def step(number: int) -> float:
        inputs = dict(batches[number % STEPS])
        loss = trainer.training_step(trainer.model, inputs)
        torch.nn.utils.clip_grad_norm_([p for p in trainer.model.parameters() if p.grad is not None], 1.0)
        trainer.optimizer.step()
        trainer.model.zero_grad(set_to_none=True)
        return float(loss)

    return step


def gkd_step(setup: Setup, model: Any) -> Callable[[int], float]:
    """Return the step of a distillation by TRL's loss: number -> loss."""
    import transformers
    from trl.experimental.gkd import GKDTrainer

    teacher = transformers.AutoModelForCausalLM.from_pretrained(setup.folder / "teacher", dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    model.train()

    def step(number: int) -> float:
        ids = setup.shape.ids(number % STEPS)[:, :-1]
        with torch.no_grad():
            wanted = teacher(ids, use_cache=False).logits
        logits = model(ids, use_cache=False).logits
        loss = GKDTrainer.generalized_jsd_loss(logits, wanted, beta=0, reduction="sum") / ids.numel()
        del logits, wanted
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def serve(pipe: Connection, name: str, setup: Setup) -> None:
    """Run the process of a side: one step for each number that arrives, until 0."""
    torch.set_num_threads(setup.threads)
    project = name.split("-")[0]
    for module in IMPORTS[project]:  # they are no part of the memory of a step
        importlib.import_module(module)
    gc.collect()
    before = resident_mb("VmRSS")
    try:
        step = {"fastgpt": own_step, "trl": trl_step}[project](setup)
    except Exception as e:
        pipe.send({"failed": reason(e)})
        return
    pipe.send({})
    done = 0
    while pipe.recv():
        start = time.perf_counter()
        loss = step(done)
        taken = time.perf_counter() - start
        pipe.send((taken, loss, resident_mb("VmHWM") - before))
        done += 1
        if done == 1:
            gc.collect()
            with contextlib.suppress(OSError):  # without this file the peak includes loading
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


class Side(Apart):
    """A side in a separate process."""

    def __init__(self, name: str, setup: Setup) -> None:
        super().__init__(name, setup, serve)
        if "failed" in self.flops:
            raise RuntimeError(self.flops["failed"])

    def step(self) -> tuple[float, float]:
        """Return the seconds and the loss of the next step."""
        self.pipe.send(1)
        taken, loss, self.peak_mb = self._answer()
        return taken, loss


def compare(shape_name: str, kind: str, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Return a row for each side."""
    shape = SHAPES[shape_name]
    tokens = shape.rows * shape.block * (2 if kind == "dpo" else 1)
    about = {"bench": "finetune", "shape": shape_name, "kind": kind, "dtype": "fp32", "block": shape.block}
    about |= {"versions": versions(), "machine": provenance(torch.device("cpu"))}
    with tempfile.TemporaryDirectory() as folder:
        write_base(shape, Path(folder))
        sides, samples, losses = {}, {name: Samples() for name in SIDES[kind]}, dict[str, list[float]]()
        try:
            for name in SIDES[kind]:
                sides[name] = Side(name, Setup(shape, kind, Path(folder), threads, name))
            for turn in range(-1, rounds):
                for name in turns(list(sides), turn):
                    taken, loss = sides[name].step()
                    losses.setdefault(name, []).append(loss)
                    if turn >= 0:  # the first step is warm-up
                        samples[name].seconds.append(taken)
        finally:
            for side in sides.values():
                side.close()
    rows = []
    for name, side in sides.items():
        middle = samples[name].quantile(0.5)
        row = {"variant": name, **samples[name].figures(), "tokens_per_s": tokens / middle, "peak_mb": side.peak_mb}
        if name != "trl":
            ratio = samples["trl"].shares(samples[name])
            row |= {f"speed{key}": ratio.quantile(q) for key, q in (("", 0.5), ("_q20", 0.2), ("_q80", 0.8))}
            row["memory"] = side.peak_mb / sides["trl"].peak_mb
        if name == "fastgpt" and kind == "distil":
            row["loss_mb"] = side.peak_mb - sides["fastgpt-no-loss"].peak_mb
            row["two_logits_mb"] = 2 * tokens * shape.vocab * 4 / 2**20
        rows.append({**about, **row, "losses": losses[name]})
    return [row for row in rows if row["variant"] != "fastgpt-no-loss"]


def write_base(shape: Shape, folder: Path) -> None:
    """Write the model both sides load, a teacher, and a tokenizer for TRL, which insists on one."""
    from fastgpt.models.weights import save_pretrained

    for seed, name in enumerate(("hf", "teacher")):
        model = GPT(shape.config(), generator=torch.Generator().manual_seed(seed)).eval()
        save_pretrained(model, folder / name, extra={"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1})
    train_tokenizer(["only ids are used, so any text will do"], 260).save(folder / "tokenizer.json")


def versions() -> dict[str, str]:
    """Return the versions of the packages that are compared."""
    return {name: metadata.version(name) for name in PACKAGES}


def show(rows: list[dict[str, Any]]) -> str:
    """Return the rows of a comparison as text."""
    lines = []
    for r in rows:
        line = f"{r['shape']:<12}{r['kind']:<7}{r['variant']:<18}{r['ms']:>9,.0f} ms{r['tokens_per_s']:>9,.0f} tokens/s"
        line += f"{r['peak_mb']:>8,.0f} MB  loss {r['losses'][0]:.5f} -> {r['losses'][-1]:.5f}"
        if "speed" in r:
            line += f"  {r['speed']:.2f} ({r['speed_q20']:.2f} .. {r['speed_q80']:.2f}) times as fast, "
            line += f"{r['memory']:.2f} of the memory"
        if "loss_mb" in r:
            line += f"; the loss itself {r['loss_mb']:,.0f} MB, two logit tensors {r['two_logits_mb']:,.0f}"
        lines.append(line)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Return 1 if a comparison has no figures, although the packages are there."""
    parser = Parser(prog="fastgpt bench finetune", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows to this file")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="may be repeated (default: both of 125M)")
    parser.add_argument("--kind", action="append", choices=SIDES, help="may be repeated (default: all)")
    parser.add_argument("--rounds", type=number(int, 1), default=7, help="timed steps (default: 7)")
    parser.add_argument("--threads", type=number(int, 1), default=available_cores(), help="default: all cores")
    parser.add_argument("--quick", action="store_true", help="tiny models, for trying this program")
    args = parser.parse_args(argv)
    if missing := [name for name in PACKAGES if util.find_spec(name) is None]:
        print(f"not measured: needs `pip install {' '.join(missing)}`")
        return 0
    shapes = args.shape or (["tiny", "tiny-llama"] if args.quick else ["gpt2-124m", "llama-125m"])
    failed = False
    print(f"fine-tuning in fp32, {where(provenance(torch.device('cpu')))}")
    for shape in shapes:
        for kind in args.kind or SIDES:
            try:
                rows = compare(shape, kind, 2 if args.quick else args.rounds, args.threads)
            except Exception as e:
                print(f"{shape} {kind}: {reason(e)}", flush=True)
                failed = True
                continue
            print(show(rows), flush=True)
            if args.json:
                append_rows(args.json, rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(run_command(main))
