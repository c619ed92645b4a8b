"""Token and position rows, weight[ids] + position_weight[:T], at (B, T, C, V); both gradients are dense tables.

Bytes, e per element, n = B T C:
    forward   reads ids, rows, positions; writes y          2 n e + T C e + 8 B T
    backward  reads ids, dy; writes dweight, dpositions       n e + T C e + V C e + 8 B T
Ids are drawn as in text: a few rows get many gradients.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.bench import _command, _op
from fastgpt.bench._op import Bench, Job, Provider, Setting, Shape, autograd_job, installed, of_phase
from fastgpt.core.command import run_command
from fastgpt.models.config import ModelConfig


def plain(ids: Tensor, weight: Tensor, position_weight: Tensor) -> Tensor:
    """Compute PyTorch's two lookups and their sum."""
    return F.embedding(ids, weight) + position_weight


def liger(ids: Tensor, weight: Tensor, position_weight: Tensor) -> Tensor:
    """Call Liger-Kernel's token lookup, and add the positions."""
    from liger_kernel.ops import LigerEmbeddingFunction

    return LigerEmbeddingFunction.apply(weight, ids) + position_weight


def job(provider: Provider, setting: Setting, phase: str, seed: int) -> Job:
    """Return one call over its own ids, tables and upstream gradient."""
    b, t, c, v = setting.shape
    leaves = setting.tensors(seed, (v, c), (t, c), grad=True)
    ids, grads = setting.tokens(v, b, t, seed=seed), setting.tensors(seed, (b, t, c))
    return autograd_job(lambda: provider.fn(ids, *leaves), leaves, grads, phase)


def bytes_moved(shape: Shape, dtype: torch.dtype, phase: str) -> int:
    """Return the bytes that a phase moves, by the formula in the module docstring."""
    b, t, c, v = shape
    n, positions, table = (rows * c * dtype.itemsize for rows in (b * t, t, v))
    return of_phase(phase, 2 * n + positions + 8 * b * t, n + positions + table + 8 * b * t)


def of_model(c: ModelConfig, batch: int, block: int) -> tuple[Shape, dict[str, Any]] | None:
    """Return the shape with position rows, whether the model has them or uses rotary embedding."""
    return (batch, block, c.width, c.padded_vocab_size), {}


BENCH = Bench(
    "embedding",
    "BxTxCxV",
    ops.embedding,
    Provider("torch", plain),
    job,
    bytes_moved,
    of_model,
    shapes={"cpu": ((4, 256, 768, 4096),), "cuda": ((64, 1024, 768, 50304), (1, 8192, 4096, 128256))},
    tiny=(1, 2, 8, 4),
    gate_cases=lambda shape: [((min(shape[3], 1000), 16, shape[2], 4, 16), {})],  # V, positions, C, B, T
    others=lambda setting: installed(setting, liger_kernel=liger),
)
pytest_generate_tests, test_embedding = _op.pytest_generate_tests, _op.run_benchmark

if __name__ == "__main__":
    sys.exit(run_command(lambda: _command.main(BENCH)))
