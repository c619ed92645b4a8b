"""The trainer's step against the same model in plain PyTorch: `python -m fastgpt.bench.throughput --device cpu`.

fastgpt: fastgpt.train's build_model, build_optimizer and train_step, nothing of its own here. torch: a nanoGPT-class
model in fastgpt/bench/plain.py (nn.LayerNorm, F.gelu, SDPA, F.cross_entropy over padded logits, clip_grad_norm_,
AdamW(fused=True); on a GPU fp32 weights under bf16 autocast), eager and, with --compile, under torch.compile. Same
weights, tokens, seed and schedule; steps are interleaved, one after another; speeds are shown only if every op's parity
check holds and the losses of the first AGREE_STEPS steps agree within TOLERANCE. Tokens are synthetic
(rank r with probability ~ 1/(r+1), so that losses fall) and lie on the device before a step. --ablation adds fastgpt
with one op at a time on PyTorch.

small: 4 layers, width 128, T 64, B 12, 65 characters; medium: 6 layers, width 384, T 256, B 16, 65 characters;
gpt2-124m: 12 layers, width 768, vocabulary 50304, B 4 of T 64 on a CPU, B 64 of T 1024 on a GPU (--batch sweeps B).

On a CPU every variant runs in a process of its own, as its user would run it: the trainer's has the trainer's settings
of malloc, the others have their defaults; one waits while another runs. On a GPU they share this process.
Peak memory: on a GPU of the allocator during a step, the other variants' tensors left out; on a CPU the most resident
memory of the variant's process over what it had before it built the model, warm-up left out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import math
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastgpt import backend
from fastgpt.bench import plain
from fastgpt.bench._harness import Samples, Setting, append_rows, gpu_state, provenance, resident_mb, turns, where
from fastgpt.bench._op import Provider, every, gate
from fastgpt.config import ModelConfig, TrainConfig
from fastgpt.device import default_device, keep_freed_memory, peak_flops

TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}  # relative difference of a step's loss
# Steps that must agree. Later ones are chaotic: at `small`, plain PyTorch with initial weights moved by one unit in the
# last place is 1e-7 apart from itself up to step 48 and 2e-4 at step 60.
AGREE_STEPS = 40
WARM_STEPS = 3  # before timing; compared, too


@dataclass(frozen=True)
class Shape:
    """Model, batch and length of one comparison, and how many steps are timed."""

    layers: int
    heads: int
    width: int
    vocab: int
    block: int
    batch: int
    steps: int


SHAPES = {
    "small": Shape(4, 4, 128, 65, 64, 12, 60),
    "medium": Shape(6, 6, 384, 65, 256, 16, 6),
    "gpt2-124m": Shape(12, 12, 768, 50304, 64, 4, 6),
}
GPU_SHAPES = {"gpt2-124m": Shape(12, 12, 768, 50304, 1024, 64, 20)}


def settings(shape: Shape, device: torch.device) -> TrainConfig:
    """The trainer's settings for this shape; GPT-2 keeps its 1024 positions."""
    model = ModelConfig(
        n_layers=shape.layers,
        n_heads=shape.heads,
        width=shape.width,
        vocab_size=shape.vocab,
        vocab_multiple=1,  # 50304 is nanoGPT's padded vocabulary, 65 it does not pad
        block_size=1024 if shape.vocab == 50304 else shape.block,
    )
    return TrainConfig(
        model=model,
        device=str(device),
        dtype="bf16" if device.type == "cuda" else "fp32",
        block_size=shape.block,
        micro_batch=shape.batch,
        batch_tokens=shape.batch * shape.block,
        max_steps=1000,
        warmup_steps=10,
        lr=1e-3,
    )


def trainer() -> ModuleType:
    """fastgpt.train; what only its console and files need (tqdm, safetensors) may be missing on a GPU machine."""
    while True:
        try:
            import fastgpt.train

            return fastgpt.train
        except ModuleNotFoundError as e:
            if e.name is None or e.name.split(".")[0] in ("fastgpt", "torch", "numpy"):
                raise
            sys.modules[e.name] = mock.MagicMock()  # a step calls nothing of it


def batches(shape: Shape, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Eight batches of (ids, targets), each (B, T), that all variants read in turn."""
    generator = torch.Generator().manual_seed(1)
    u = torch.rand((8, shape.batch, shape.block + 1), generator=generator, dtype=torch.float64)
    ids = ((shape.vocab**u).long() - 1).to(device)
    return [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in ids]


@dataclass
class Variant:
    """One way to train: `step(rate)` does one optimizer step and returns its loss, on the device."""

    name: str
    step: Callable[[float], Tensor]
    kernels: dict[str, Any] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    peak_mb: float | None = None

    def train(self, cfg: TrainConfig, steps: int) -> float:
        """The next steps of the schedule; returns seconds, the device's work included."""
        learning_rate = trainer().learning_rate
        wait = torch.cuda.synchronize if torch.device(cfg.device).type == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        with backend.use(**self.kernels):
            for _ in range(steps):
                self.losses.append(self.step(learning_rate(cfg, len(self.losses), cfg.max_steps)))
        wait()
        return time.perf_counter() - start

    def close(self) -> None:
        """Nothing to end; see Apart."""


class Apart:
    """A Variant on the CPU in a process of its own."""

    def __init__(self, name: str, shape: Shape) -> None:
        self.name, self.losses, self.peak_mb = name, list[Tensor](), math.nan
        context = multiprocessing.get_context("spawn")  # a fork would inherit PyTorch's threads without their lives
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, name, shape), daemon=True)
        self.process.start()
        theirs.close()
        self.flops: dict[str, float] = self._answer()

    def _answer(self) -> Any:
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"the process of {self.name} ended; its message is above") from None
        return answer

    def train(self, cfg: TrainConfig, steps: int) -> float:
        """As Variant.train, timed over there."""
        self.pipe.send(steps)
        seconds, losses, self.peak_mb = self._answer()
        self.losses += torch.tensor(losses).unbind()
        return float(seconds)

    def close(self) -> None:
        """End the process."""
        self.pipe.send(0)
        self.process.join()


def _serve(pipe: Connection, name: str, shape: Shape) -> None:
    """The process of an Apart: build, then train as many steps as asked for until 0 comes."""
    cfg = settings(shape, torch.device("cpu"))
    trainer()
    before = resident_mb("VmRSS")
    v = build(name, cfg, batches(shape, torch.device("cpu")))
    pipe.send(v.flops)
    while steps := pipe.recv():
        seconds = v.train(cfg, steps)
        fresh = torch.stack(v.losses[-steps:]).tolist()
        pipe.send((seconds, fresh, resident_mb("VmHWM") - before))
        if len(v.losses) <= WARM_STEPS:
            gc.collect()
            with contextlib.suppress(OSError):  # without it the peak includes warm-up
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts anew


def build(name: str, cfg: TrainConfig, data: list[tuple[Tensor, Tensor]]) -> Variant:
    """'fastgpt', 'torch', either with ' compile'; 'fastgpt -OP': OP on PyTorch."""
    train, device = trainer(), torch.device(cfg.device)
    assert cfg.model.vocab_size is not None
    compiled, loader = name.endswith(" compile"), itertools.cycle(data)
    model = train.build_model(dataclasses.replace(cfg, compile=compiled), cfg.model.vocab_size, device)
    if name.startswith("torch"):
        return Variant(name, plain.make_step(model, cfg, loader, compiled))
    if device.type == "cpu":
        keep_freed_memory()
    optimizer = train.build_optimizer(cfg, model)
    run = torch.compile(model) if compiled else model

    def step(rate: float) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = rate
        return train.train_step(run, optimizer, loader, cfg.accumulation)[0]

    _, _, without = name.partition(" -")
    return Variant(name, step, {without: "torch"} if without else {}, model.flops_per_token(cfg.block_size))


def kernels(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Which backend serves each op."""
    return {op: backend.explain(op, device.type, dtype)[0] for op in backend.ops()}


def red_ops(cfg: TrainConfig, dtype: torch.dtype) -> list[str]:
    """Why a kernel in use is not right, by its parity check at the model's widths."""
    device, found = torch.device(cfg.device), []
    for bench in every():
        picked = backend.explain(bench.op, device.type, dtype)[0]
        used = bench.of_model(cfg.model, 1, min(64, cfg.block_size))
        if picked == "torch" or used is None:
            continue
        if why := gate(bench, Provider(picked, bench.public, picked), Setting(used[0], dtype, device)):
            found.append(f"{bench.op} on {picked}: {why}")
    return found


def disagreement(variants: list[Any], tolerance: float) -> tuple[float, str]:
    """The largest relative difference of a step's loss to the first variant's, and a sentence if it is too large."""
    worst, sentence = 0.0, ""
    truth = torch.stack(variants[0].losses[:AGREE_STEPS]).double().cpu()
    for v in variants[1:]:
        losses = torch.stack(v.losses[:AGREE_STEPS]).double().cpu()
        gaps = torch.nan_to_num((losses - truth).abs() / truth.abs(), nan=math.inf)
        step = int(gaps.argmax())
        if float(gaps[step]) > tolerance and not sentence:
            sentence = f"loss of {v.name} at step {step} is {losses[step]:.6f}, of {variants[0].name} {truth[step]:.6f}"
        worst = max(worst, float(gaps[step]))
    return worst, sentence


def time_steps(variants: list[Any], cfg: TrainConfig, rounds: int, block: int) -> dict[str, Samples]:
    """Seconds per step, one sample a round: `block` steps of each variant in turn."""
    samples = {v.name: Samples() for v in variants}
    by_name = {v.name: v for v in variants}
    for number in range(rounds):
        for name in turns(list(by_name), number):
            samples[name].seconds.append(by_name[name].train(cfg, block) / block)
    return samples


def prepare(names: list[str], cfg: TrainConfig, shape: Shape) -> tuple[list[Any], list[str]]:
    """Variants warmed up, with their peak memory on a GPU; and the names of those that do not fit."""
    cuda = cfg.device.startswith("cuda")
    if not cuda:
        apart = [Apart(name, shape) for name in names]
        for process in apart:
            process.train(cfg, WARM_STEPS)
        return apart, []
    variants: list[Any] = []
    too_large, data = [], batches(shape, torch.device(cfg.device))
    for name in names:
        try:
            before = torch.cuda.memory_allocated()
            v = build(name, cfg, data)
            v.train(cfg, WARM_STEPS - 1)
            torch.cuda.reset_peak_memory_stats()
            v.train(cfg, 1)
            v.peak_mb = (torch.cuda.max_memory_allocated() - before) / 1e6
            variants.append(v)
        except torch.OutOfMemoryError:
            too_large.append(name)
        gc.collect()
        torch.cuda.empty_cache()
    return variants, too_large


def compare(names: list[str], shape_name: str, shape: Shape, device: torch.device) -> list[dict[str, Any]]:
    """One row per variant, or a single row with the reason why no speed is shown."""
    cfg = settings(shape, device)
    tolerance = TOLERANCE[cfg.dtype]
    dtype = torch.bfloat16 if cfg.dtype == "bf16" else torch.float32
    about = {"bench": "throughput", "shape": shape_name, "batch": shape.batch, "block": shape.block, "dtype": cfg.dtype}
    about |= {"model": vars(cfg.model), "kernels": kernels(device, dtype), "machine": provenance(device)}
    if red := red_ops(cfg, dtype):
        return [{**about, "red": "; ".join(red)}]
    variants, too_large = prepare(names, cfg, shape)
    if len(variants) < 2 or variants[0].name != names[0]:
        return [{**about, "red": f"out of memory: {', '.join(too_large)}"}]
    block = 1 if device.type == "cpu" else min(8, max(1, 64 // shape.batch))
    samples = time_steps(variants, cfg, shape.steps, block)
    for v in variants:
        v.close()
    state = gpu_state(device)
    gap, sentence = disagreement(variants, tolerance)
    about |= {"loss_gap": gap, "loss_tolerance": tolerance, "steps_per_sample": block, "gpu": state}
    if sentence:
        return [{**about, "red": f"{sentence}: more than {tolerance:g} apart"}]
    flops = next(v.flops for v in variants if v.flops)
    rows = [{**about, **figures(v, variants, samples, shape, flops, peak_flops(device, dtype))} for v in variants]
    return rows + [{**about, "variant": name, "red": "out of memory"} for name in too_large]


def figures(
    v: Any,
    variants: list[Any],
    samples: dict[str, Samples],
    shape: Shape,
    flops: dict[str, float],
    peak: tuple[float, str],
) -> dict[str, Any]:
    """Time, speed, both MFUs and memory of one variant; ratios are medians over the rounds, more than 1 is faster."""
    mine, tokens = samples[v.name], shape.batch * shape.block
    middle = mine.quantile(0.5)
    row: dict[str, Any] = {"variant": v.name, **mine.figures(), "tokens_per_s": tokens / middle, "peak_mb": v.peak_mb}
    if v is not variants[0]:
        row |= mine.against(samples[variants[0].name], variants[0].name)
    row |= {f"mfu_{name}": per_token * tokens / middle / peak[0] for name, per_token in flops.items()}
    row |= {"peak_flops": peak[0], "peak_flops_from": peak[1], "losses": torch.stack(v.losses).tolist()}
    for other in variants:
        if other.name.startswith("torch") and other is not v:
            paired = samples[other.name].shares(mine)
            row[f"speed_vs_{other.name}"] = [paired.quantile(q) for q in (0.5, 0.2, 0.8)]
    return row


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a table, or the reason why there is none."""
    good = [r for r in rows if "red" not in r]
    lines = []
    if good:
        first = good[0]
        served = ", ".join(f"{op} {b}" for op, b in first["kernels"].items() if b != "torch") or "all torch"
        lines.append(f"kernels: {served}; peak {first['peak_flops'] / 1e12:.3g} TFLOP/s ({first['peak_flops_from']})")
        lines.append(f"losses agree: {first['loss_gap']:.1e} apart, {first['loss_tolerance']:g} allowed")
        lines.append(
            f"{'variant':<24}{'ms a step (20 .. 80 %)':<28}{'tokens/s':>10}{'MFU full':>10}{'causal':>8}{'peak MB':>10}"
            "  speed (20 .. 80 %) against"
        )
    if any(max(r["mfu_full"], r["mfu_causal"]) > 1 for r in good):
        lines.insert(1, "the measured peak is under the steps' own rate (a busy machine?): MFU means nothing here")
    for r in good:
        times = f"{r['ms']:.1f} ({r['ms_q20']:.1f} .. {r['ms_q80']:.1f})"
        peak = "-" if r["peak_mb"] is None else f"{r['peak_mb']:,.0f}"
        against = [
            f"{key[9:]} {m:.3f} ({low:.3f} .. {high:.3f})"
            for key, (m, low, high) in ((k, v) for k, v in r.items() if k.startswith("speed_vs_"))
        ]
        mfu = f"{r['mfu_full']:>10.1%}{r['mfu_causal']:>8.1%}"
        lines.append(f"{r['variant']:<24}{times:<28}{r['tokens_per_s']:>10,.0f}{mfu}{peak:>10}  {', '.join(against)}")
    return "\n".join(lines + [f"{r.get('variant', 'no speed is shown')}: {r['red']}" for r in rows if "red" in r])


def variant_names(args: argparse.Namespace, device: torch.device) -> list[str]:
    """The first is what the others' losses are compared with."""
    names = ["torch", "fastgpt"] + (["torch compile", "fastgpt compile"] if args.compile else [])
    if args.ablation:
        served = kernels(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        names += [f"fastgpt -{op}" for op, picked in served.items() if picked != "torch"]
    return names


def main(argv: list[str] | None = None) -> int:
    """1 if losses or an op were wrong, so that no speed was shown."""
    parser = argparse.ArgumentParser(prog="python -m fastgpt.bench.throughput", description=__doc__)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="default: small on a CPU, gpt2-124m on a GPU")
    parser.add_argument("--batch", action="append", type=int, help="sequences; may be repeated (a sweep)")
    parser.add_argument("--steps", type=int, help="rounds that are timed")
    parser.add_argument("--compile", action="store_true", help="both under torch.compile, too")
    parser.add_argument("--ablation", action="store_true", help="fastgpt with one op at a time on PyTorch, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows to this file")
    args = parser.parse_args(argv)
    device = default_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    shapes = GPU_SHAPES | {k: v for k, v in SHAPES.items() if k not in GPU_SHAPES} if device.type == "cuda" else SHAPES
    status = 0
    for name in args.shape or ["gpt2-124m" if device.type == "cuda" else "small"]:
        for batch in args.batch or [shapes[name].batch]:
            shape = dataclasses.replace(shapes[name], batch=batch, steps=args.steps or shapes[name].steps)
            rows = compare(variant_names(args, device), name, shape, device)
            about = f"{name}: {shape.layers} layers, width {shape.width}, vocabulary {shape.vocab}"
            print(f"{about}, B {batch} x T {shape.block}, {rows[0]['dtype']}, {where(rows[0]['machine'])}")
            print(show(rows), flush=True)
            if args.json:
                append_rows(args.json, rows)
            status |= any("red" in r and r["red"] != "out of memory" for r in rows)
    return status


if __name__ == "__main__":
    sys.exit(main())
