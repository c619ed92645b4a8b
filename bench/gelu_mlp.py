"""MLP with GELU (the tanh form, as in GPT-2) at (N, C, F): x (N, C), F between the two products.

FLOP: forward 4 N C F, backward 8 N C F.
Bytes, e per element, n = N F, w = C F:
    forward   reads x, both weights; writes u, h, y                   (2 n + 2 N C + 2 w) e
    backward  reads dy, x, u, h, both weights; writes dx, du, gradients    (3 n + 3 N C + 4 w) e
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.bench import _command, _op
from fastgpt.bench._op import Bench, Job, Provider, Setting, Shape, autograd_job, of_phase
from fastgpt.core.command import run_command
from fastgpt.models.config import ModelConfig


def plain(x: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor) -> Tensor:
    """Compute the layers one by one in PyTorch."""
    return F.linear(F.gelu(F.linear(x, up_weight, up_bias), approximate="tanh"), down_weight)


def job(provider: Provider, setting: Setting, phase: str, seed: int) -> Job:
    """Return one call over its own x, weights (scaled so that products are around one), bias and upstream gradient."""
    n, c, f = setting.shape
    leaves = x, up, bias, down = setting.tensors(seed, (n, c), (f, c), (f,), (c, f), grad=True)
    up.data.mul_(c**-0.5)
    down.data.mul_(f**-0.5)
    return autograd_job(lambda: provider.fn(x, up, bias, down), leaves, setting.tensors(seed, (n, c)), phase)


def bytes_moved(shape: Shape, dtype: torch.dtype, phase: str) -> int:
    """Return the bytes that a phase moves, by the formula in the module docstring."""
    n, c, f = shape
    inner, outer, weight = n * f * dtype.itemsize, n * c * dtype.itemsize, c * f * dtype.itemsize
    return of_phase(phase, 2 * (inner + outer + weight), 3 * (inner + outer) + 4 * weight)


def flops(shape: Shape, phase: str) -> float:
    """Return the FLOP of a phase, by the formula in the module docstring."""
    n, c, f = shape
    return of_phase(phase, 4.0 * n * c * f, 8.0 * n * c * f)


def of_model(c: ModelConfig, batch: int, block: int) -> tuple[Shape, dict[str, Any]] | None:
    """Return None: a training step calls the op only with the setting `epilogues`."""
    return None


def gate_cases(shape: Shape) -> list[tuple[Shape, dict[str, Any]]]:
    """Return cases of the shape's widths; those of parity name the output's width, too."""
    n, c, f = shape
    return [((min(n, 64), c, f, c), {"approximate": a}) for a in ("none", "tanh")]


BENCH = Bench(
    "gelu_mlp",
    "NxCxF",
    functools.partial(ops.gelu_mlp, approximate="tanh"),
    Provider("torch", plain),
    job,
    bytes_moved,
    of_model,
    shapes={"cpu": ((256, 768, 3072),), "cuda": ((65536, 768, 3072), (8192, 4096, 16384))},
    tiny=(1, 8, 8),
    gate_cases=gate_cases,
    flops=flops,
)
pytest_generate_tests, test_gelu_mlp = _op.pytest_generate_tests, _op.run_benchmark

if __name__ == "__main__":
    sys.exit(run_command(lambda: _command.main(BENCH)))
