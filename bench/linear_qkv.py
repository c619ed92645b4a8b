"""Packed projection at (N, C, Q, G): x (N, C) to Q columns of queries, G of keys and G of values.

FLOP: forward 2 N C (Q + 2 G), backward twice that.
Bytes, e per element, with F = Q + 2 G:
    forward   reads x, weight and bias; writes q, k, v                        (N C + N F + F C) e
    backward  reads dq, dk, dv, x and weight; writes dx and the gradients     (2 N C + N F + 2 F C) e
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from fastgpt import ops
from fastgpt.bench import _command, _op
from fastgpt.bench._op import Bench, Job, Provider, Setting, Shape, autograd_job, of_phase
from fastgpt.core.command import run_command
from fastgpt.models.config import ModelConfig
from fastgpt.ops.linear_qkv import linear_qkv_torch


def job(provider: Provider, setting: Setting, phase: str, seed: int) -> Job:
    """Return one call over its own x, weight (scaled so that products are around one), bias and upstream gradients."""
    n, c, q, kv = setting.shape
    leaves = x, weight, bias = setting.tensors(seed, (n, c), (q + 2 * kv, c), (q + 2 * kv,), grad=True)
    weight.data.mul_(c**-0.5)
    grads = setting.tensors(seed, (n, q), (n, kv), (n, kv))
    return autograd_job(lambda: provider.fn(x, weight, bias, n_kv=kv), leaves, grads, phase)


def bytes_moved(shape: Shape, dtype: torch.dtype, phase: str) -> int:
    """Return the bytes that a phase moves, by the formula in the module docstring."""
    n, c, q, kv = shape
    f = q + 2 * kv
    forward, backward = n * c + n * f + f * c, 2 * n * c + n * f + 2 * f * c
    return of_phase(phase, forward * dtype.itemsize, backward * dtype.itemsize)


def flops(shape: Shape, phase: str) -> float:
    """Return the FLOP of a phase, by the formula in the module docstring."""
    n, c, q, kv = shape
    one = 2.0 * n * c * (q + 2 * kv)
    return of_phase(phase, one, 2 * one)


def of_model(c: ModelConfig, batch: int, block: int) -> tuple[Shape, dict[str, Any]] | None:
    """Return None: a training step calls the op only with the setting `epilogues`."""
    return None


def gate_cases(shape: Shape) -> list[tuple[Shape, dict[str, Any]]]:
    """Return a case of the shape's widths."""
    n, *widths = shape
    return [((min(n, 64), *widths), {})]


BENCH = Bench(
    "linear_qkv",
    "NxCxQxG",
    ops.linear_qkv,
    Provider("torch", linear_qkv_torch),
    job,
    bytes_moved,
    of_model,
    shapes={"cpu": ((256, 768, 768, 768),), "cuda": ((65536, 768, 768, 768), (8192, 4096, 4096, 1024))},
    tiny=(1, 8, 8, 8),
    gate_cases=gate_cases,
    flops=flops,
    phases=("backward", "both"),  # the forward is PyTorch's product on every backend
)
pytest_generate_tests, test_linear_qkv = _op.pytest_generate_tests, _op.run_benchmark

if __name__ == "__main__":
    sys.exit(run_command(lambda: _command.main(BENCH)))
