"""Linear layer without gradients on the few rows of a generation step, x (N, C) weight (F, C)^T, at (N, C, F).

FLOP: 2 N C F.
Bytes, e per element: reads x, weight; writes y    (N C + F C + N F) e
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F

from fastgpt import ops
from fastgpt.bench import _command, _op
from fastgpt.bench._op import Bench, Job, Provider, Setting, Shape
from fastgpt.core.command import run_command
from fastgpt.models.config import ModelConfig


def job(provider: Provider, setting: Setting, phase: str, seed: int) -> Job:
    """Return one call over its own x and weight."""
    n, c, f = setting.shape
    x, weight = setting.tensors(seed, (n, c), (f, c))
    return Job(lambda: provider.fn(x, weight))


def bytes_moved(shape: Shape, dtype: torch.dtype, phase: str) -> int:
    """Return the bytes that a call moves, by the formula in the module docstring."""
    n, c, f = shape
    return (n * c + f * c + n * f) * dtype.itemsize


def flops(shape: Shape, phase: str) -> float:
    """Return the FLOP of a call, by the formula in the module docstring."""
    n, c, f = shape
    return 2.0 * n * c * f


def of_model(c: ModelConfig, batch: int, block: int) -> tuple[Shape, dict[str, Any]] | None:
    """Return None: products of a training step are PyTorch's."""
    return None


BENCH = Bench(
    "linear",
    "NxCxF",
    ops.linear,
    Provider("torch", F.linear),
    job,
    bytes_moved,
    of_model,
    shapes={"cpu": ((16, 768, 3072), (1, 768, 3072)), "cuda": ((16, 768, 3072),)},
    tiny=(1, 8, 8),
    gate_cases=lambda shape: [((min(shape[0], 64), shape[1], min(shape[2], 256)), {})],
    flops=flops,
    phases=("forward",),
)
pytest_generate_tests, test_linear = _op.pytest_generate_tests, _op.run_benchmark

if __name__ == "__main__":
    sys.exit(run_command(lambda: _command.main(BENCH)))
