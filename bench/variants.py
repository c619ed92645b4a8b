"""The ways to train that benchmarks compare: the steps of fastgpt and of plain PyTorch, at GPT-2 and Llama shapes.

`build(name, cfg, batches)` builds one in this process, `Apart` runs one in a separate process, `prepare` builds and
warms up all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.bench import plain
from fastgpt.bench._harness import resident_mb
from fastgpt.core import backend
from fastgpt.core.device import dtype_of, keep_freed_memory
from fastgpt.distributed.mesh import ALONE
from fastgpt.models.config import ModelConfig
from fastgpt.optim import AdamW
from fastgpt.optim.muon import MuonAdamW
from fastgpt.train import accumulate, forward_backward, optimizer_step
from fastgpt.training.build import build_model, build_optimizer
from fastgpt.training.config import TrainConfig
from fastgpt.training.graphs import Graphs
from fastgpt.training.schedule import learning_rate
from fastgpt.training.stability import LossScale, SpikeGuard
from fastgpt.training.task import Batch, NextToken

OWN = "fastgpt own"  # the variant in which kernels of fastgpt serve every op that has one
WARM_STEPS = 3  # before timing; their losses are compared, too
GPU_WARM_STEPS = 6  # graphs are recorded in the fourth step


@dataclass(frozen=True)
class Shape:
    """Model, batch and length of one comparison, and how many steps are timed; `llama`: a Llama model."""

    layers: int
    heads: int
    width: int
    vocab: int
    block: int
    batch: int
    steps: int
    llama: bool = False


SHAPES = {
    "small": Shape(4, 4, 128, 65, 64, 12, 60),
    "medium": Shape(6, 6, 384, 65, 256, 16, 6),
    "gpt2-124m": Shape(12, 12, 768, 50304, 64, 4, 6),
    "llama-small": Shape(4, 4, 128, 65, 64, 12, 60, llama=True),
}
GPU_SHAPES = {  # the models of fastgpt/configs, which cannot be read without PyYAML
    "gpt2-124m": Shape(12, 12, 768, 50304, 1024, 64, 20),
    "gpt2-350m": Shape(24, 16, 1024, 50304, 1024, 32, 20),
    "gpt2-774m": Shape(36, 20, 1280, 50304, 1024, 16, 20),
    "gpt2-1.5b": Shape(48, 25, 1600, 50304, 1024, 8, 20),
    "llama-125m": Shape(12, 12, 768, 32000, 1024, 64, 20, llama=True),
}
LLAMA: dict[str, Any] = dict(norm="rms", activation="swiglu", positions="rope", tied=False)
LLAMA |= dict(qkv_bias=False, proj_bias=False, mlp_bias=False)


def shapes_on(device: torch.device) -> dict[str, Shape]:
    """Return the shapes by name; a GPU has another length and batch for GPT-2, and larger models."""
    return SHAPES | GPU_SHAPES if device.type == "cuda" else SHAPES


def default_shape(device: torch.device) -> str:
    """Return the shape that is measured if none is named."""
    return "gpt2-124m" if device.type == "cuda" else "small"


def settings(shape: Shape, device: torch.device) -> TrainConfig:
    """Return the trainer's settings for this shape; GPT-2 keeps its 1024 positions."""
    model = ModelConfig(
        n_layers=shape.layers,
        n_heads=shape.heads,
        width=shape.width,
        vocab_size=shape.vocab,
        vocab_multiple=1,  # 50304 is nanoGPT's padded vocabulary; 65 is not padded there
        block_size=1024 if shape.vocab == 50304 else shape.block,
        **(LLAMA if shape.llama else {}),
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


def batches(shape: Shape, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Return eight batches of (ids, targets), each (B, T), that all variants read in turn."""
    generator = torch.Generator().manual_seed(1)
    u = torch.rand((8, shape.batch, shape.block + 1), generator=generator, dtype=torch.float64)
    ids = ((shape.vocab**u).long() - 1).to(device)
    return [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in ids]


def own_kernels(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Return the backend of every op for which fastgpt has a kernel that runs on this device: where `auto` prefers
    PyTorch's op, the first kernel of the prior order."""
    found: dict[str, str] = {}
    for op, cells in backend.ops().items():
        for b in backend.PRIOR_OF.get(op, backend.PRIOR):
            there = b in cells and backend.DEVICE_OF.get(b) == device.type
            if op not in found and there and backend.refusal(op, b, device.type, dtype) is None:
                found[op] = b
    return found


def choices(name: str, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Return the backends that a variant of this name chooses; `auto` chooses the others."""
    _, _, without = name.partition(" -")
    if without:
        return {without: "torch"}
    return own_kernels(device, dtype) if name.startswith(OWN) else {}


@dataclass
class Variant:
    """One way to train: `step(rate)` runs one optimizer step and returns its loss, on the device."""

    name: str
    step: Callable[[float], Tensor]
    kernels: dict[str, Any] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    peak_mb: float | None = None
    stream: Any = None  # torch.cuda.Stream; None: the current one

    def train(self, cfg: TrainConfig, steps: int) -> float:
        """Run the next steps of the schedule; return seconds, the device's work included."""
        wait = torch.cuda.synchronize if torch.device(cfg.device).type == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        with backend.use(**self.kernels), torch.cuda.stream(self.stream):
            for _ in range(steps):
                self.losses.append(self.step(learning_rate(cfg, len(self.losses), cfg.most_steps)))
        wait()
        return time.perf_counter() - start

    def close(self) -> None:
        """Do nothing; Apart.close ends a process."""


class Apart:
    """A Variant on the CPU in a separate process, which runs `serve`."""

    def __init__(self, name: str, shape: Any, serve: Callable[[Connection, str, Any], None] | None = None) -> None:
        self.name, self.losses, self.peak_mb = name, list[Tensor](), math.nan
        context = multiprocessing.get_context("spawn")  # a fork would inherit PyTorch's state without its threads
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve or _serve, args=(theirs, name, shape), daemon=True)
        self.process.start()
        theirs.close()
        self.flops: dict[str, float] = self._answer()

    def _answer(self) -> Any:
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"the process of {self.name} ended; its message is above") from None
        return answer

    def train(self, cfg: TrainConfig | None, steps: int) -> float:
        """Run the next steps like Variant.train, timed in the other process."""
        self.pipe.send(steps)
        seconds, losses, self.peak_mb = self._answer()
        self.losses += torch.tensor(losses).unbind()
        return float(seconds)

    def close(self) -> None:
        """End the process."""
        self.pipe.send(0)
        self.process.join()


def _serve(pipe: Connection, name: str, shape: Shape) -> None:
    """Run the process of an Apart: build, then train."""
    cfg = settings(shape, torch.device("cpu"))
    before = resident_mb("VmRSS")
    v = build(name, cfg, batches(shape, torch.device("cpu")))
    pipe.send(v.flops)
    answer(pipe, v, cfg, before)


def answer(pipe: Connection, v: Any, cfg: TrainConfig | None, before: float) -> None:
    """Train as many steps as requested until 0 arrives; send seconds, losses and the peak beyond `before` MB."""
    while steps := pipe.recv():
        seconds = v.train(cfg, steps)
        fresh = torch.stack(v.losses[-steps:]).tolist()
        pipe.send((seconds, fresh, resident_mb("VmHWM") - before))
        if len(v.losses) <= WARM_STEPS:
            gc.collect()
            with contextlib.suppress(OSError):  # without this file the peak includes warm-up
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the high-water mark


def train_step(
    model: Any,
    optimizer: AdamW | MuonAdamW,
    loader: Iterator[tuple[Tensor, Tensor]],
    accumulation: int,
    guard: SpikeGuard | None = None,
    scaling: LossScale | None = None,
    graphs: Graphs | None = None,
) -> Tensor:
    """Run one step with the functions of the loop in fastgpt/train.py; return (loss, gradient norm, spike), on the
    device."""
    graphs = Graphs(model, enabled=False) if graphs is None else graphs
    task = NextToken()
    one_batch = partial(forward_backward, model, task, scaling)
    micro_step = lambda i, *batch: graphs("accumulate" if i else "forward_backward", one_batch, *batch)  # noqa: E731
    update = partial(optimizer_step, optimizer, guard, scaling)
    graphs.begin(optimizer)
    batches = [Batch(*next(loader)) for _ in range(accumulation)]
    return graphs("optimizer_step", update, accumulate(task, ALONE, batches, micro_step))


def build(name: str, cfg: TrainConfig, data: list[tuple[Tensor, Tensor]]) -> Variant:
    """Build 'fastgpt', 'torch', either with ' compile'; 'fastgpt graphs': as it trains on a GPU; 'fastgpt -OP': OP
    on PyTorch; 'fastgpt own', with or without ' graphs': no op on PyTorch that has a kernel."""
    device = torch.device(cfg.device)
    assert cfg.model.vocab_size is not None
    compiled, loader = name.endswith(" compile"), itertools.cycle(data)
    model = build_model(dataclasses.replace(cfg, compile=compiled), cfg.model.vocab_size, device)
    if name.startswith("torch"):
        return Variant(name, plain.make_step(model, cfg, loader, compiled))
    if device.type == "cpu":
        keep_freed_memory()
    optimizer = build_optimizer(cfg, model)
    run = torch.compile(model) if compiled else model
    graphs = Graphs(model, enabled=name.endswith(" graphs"))

    def step(rate: float) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = train_step(run, optimizer, loader, cfg.accumulation, graphs=graphs)[0]
        if graphs.failure:
            raise RuntimeError(f"{name}: not recorded: {graphs.failure}")
        return loss.clone() if graphs.enabled else loss  # the next step overwrites it

    kernels = choices(name, device, dtype_of(cfg.dtype, device.type))
    stream = torch.cuda.Stream(device) if graphs.enabled and device.type == "cuda" else None
    return Variant(name, step, kernels, model.flops_per_token(cfg.block_size), stream=stream)


def prepare(names: list[str], cfg: TrainConfig, shape: Shape) -> tuple[list[Any], dict[str, str]]:
    """Return the variants after warm-up, with their peak memory on a GPU, and why each of the others failed."""
    variants: list[Any] = []
    failed: dict[str, str] = {}
    cuda = cfg.device.startswith("cuda")
    data = batches(shape, torch.device(cfg.device)) if cuda else []
    for name in names:
        try:
            variants.append(_warm(name, cfg, data) if cuda else _apart(name, cfg, shape))
        except Exception as e:  # from the compiler or the device: only this variant loses its figures
            failed[name] = reason(e)
        if cuda:
            gc.collect()
            torch.cuda.empty_cache()
    return variants, failed


def reason(e: Exception) -> str:
    """Describe an exception for a row."""
    if isinstance(e, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"


def _apart(name: str, cfg: TrainConfig, shape: Shape) -> Any:
    v = Apart(name, shape)
    v.train(cfg, WARM_STEPS)
    return v


def _warm(name: str, cfg: TrainConfig, data: list[tuple[Tensor, Tensor]]) -> Variant:
    """Warm up a variant on the GPU and measure its memory: the most that a step allocated, or what it keeps reserved
    where steps are replayed, since a replay allocates nothing and works in the graphs' own pool."""
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    v = build(name, cfg, data)
    v.train(cfg, GPU_WARM_STEPS - 1)
    torch.cuda.reset_peak_memory_stats()
    v.train(cfg, 1)
    v.peak_mb = (torch.cuda.max_memory_allocated() - allocated) / 1e6
    if name.endswith(" graphs"):
        gc.collect()
        torch.cuda.empty_cache()  # free what warm-up left behind
        v.peak_mb = (torch.cuda.memory_reserved() - reserved) / 1e6
    return v
