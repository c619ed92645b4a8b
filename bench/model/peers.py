"""The same arithmetic for single ops of other libraries: Liger's Triton kernels where it is installed, PyTorch's by
their bytes.

Each op runs forward and backward at the shape it has in a step, on the meta device, through the calls of its benchmark
(fastgpt/bench/OP.py); head and loss also at LOSSES, and by arithmetic for designs that nobody has written (losses.py).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt.bench._harness import Setting
from fastgpt.bench._op import Bench, Provider, bench_of, chosen
from fastgpt.bench.model import library, losses
from fastgpt.bench.model.as_cuda import as_cuda
from fastgpt.bench.model.recording import META, Recorder, as_if_on
from fastgpt.bench.model.step import DEVICES, Modeller, Row, Step
from fastgpt.core import backend

OPS = ("layer_norm", "rms_norm", "bias_gelu", "swiglu", "rope", "cross_entropy", "embedding", "linear_cross_entropy")
LOSSES = tuple((16384, c, v) for c in (768, 4096) for v in (50304, 128256))  # N, C, V
PHASE = "both"


@dataclass(frozen=True)
class Shapeless(Setting):
    """A setting whose tensors have shapes and no values."""

    def random(self, *shape: int, seed: int, dtype: torch.dtype | None = None, grad: bool = False) -> Tensor:
        """Return a tensor of the meta device."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=META).requires_grad_(grad)


def providers(bench: Bench) -> list[Provider]:
    """Return our backends, Liger's function if the benchmark has one and it is installed, PyTorch's."""
    own = [Provider(name, bench.public, name) for name in ("cuda", "triton") if name in backend.ops()[bench.op]]
    module = importlib.import_module(f"fastgpt.bench.{bench.op}")
    liger = getattr(module, "liger", None) if importlib.util.find_spec("liger_kernel") else None
    if liger is not None:  # before tensors pass for CUDA tensors: what it imports would look for a GPU then
        importlib.import_module("liger_kernel.transformers.functional")
    found = [] if liger is None else [Provider("liger", liger, package="liger_kernel")]
    return [*own, *found, bench.baseline]


def rows(step: Step, modeller: Modeller) -> list[Row]:
    """Return a row for each op of the step and provider: us of forward and backward together, or why there is none."""
    found = []
    for op in OPS:
        bench = bench_of(op)
        used = bench.of_model(step.cfg.model, step.cfg.sequences, step.cfg.block_size)
        if used is None:
            continue
        for shape in dict.fromkeys((used[0], *(LOSSES if op == "linear_cross_entropy" else ()))):
            row: Row = {"op": op, "shape": "x".join(map(str, shape))}
            found += [row | _row_of(bench, provider, shape, step, modeller) for provider in providers(bench)]
            if op == "linear_cross_entropy":
                found += [row | designed for designed in _designs(shape, step)]
    return found


def _designs(shape: tuple[int, ...], step: Step) -> list[Row]:
    n, c, v = shape
    us = {name: 1e6 * losses.design_seconds(name, n, c, v, step.chip) for name in losses.DESIGNS}
    about = {"launches": 0, "slowest": "-", "limit": "arithmetic"}
    return [{"provider": name, "us": value, **about} for name, value in us.items()]


def _row_of(bench: Bench, provider: Provider, shape: tuple[int, ...], step: Step, modeller: Modeller) -> Row:
    try:
        return {"provider": provider.name} | _figures(bench, provider, shape, step, modeller)
    except Exception as e:  # another library may need a device
        return {"provider": provider.name, "red": f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"}


def _figures(bench: Bench, provider: Provider, shape: tuple[int, ...], step: Step, modeller: Modeller) -> Row:
    recorder = Recorder(modeller.planner, number=1)
    with as_if_on(DEVICES[step.chip.name], recorder), chosen(bench.op, provider):
        job = bench.job(provider, Shapeless(shape, torch.bfloat16, META), PHASE, 1)
        with as_cuda() if provider.package else contextlib.nullcontext(), recorder:
            job.run()
    kernels = modeller.rows(recorder.calls)
    count = sum(row["count"] for row in kernels)
    us = sum(row["ms"] for row in kernels) * 1e3 + 1e6 * library.GAP * count
    slowest: Any = max(kernels, key=lambda row: row["ms"])
    return {"us": us, "launches": count, "slowest": slowest["kernel"], "limit": slowest["limit"]}
