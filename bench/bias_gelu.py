"""Bias + GELU (the tanh form, as in GPT-2) at (N, F).

Bytes, e per element, n = N F:
    forward   reads x, bias; writes y                  2 n e +   F e
    backward  reads dy, x, bias; writes dx, dbias      3 n e + 2 F e
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
from fastgpt.bench._op import Bench, Job, Provider, Setting, Shape, autograd_job, installed, of_phase
from fastgpt.core.command import run_command
from fastgpt.models.config import GATED, ModelConfig


def plain(x: Tensor, bias: Tensor) -> Tensor:
    """Compute both in PyTorch, in two passes."""
    return F.gelu(x + bias, approximate="tanh")


def flash_attn(x: Tensor, bias: Tensor) -> Tensor:
    """Call flash-attn's version, fused by TorchScript."""
    from flash_attn.ops.activations import bias_gelu_impl

    return bias_gelu_impl(x, bias)


def job(provider: Provider, setting: Setting, phase: str, seed: int) -> Job:
    """Return one call over its own x, bias and upstream gradient."""
    n, f = setting.shape
    leaves = setting.tensors(seed, (n, f), (f,), grad=True)
    return autograd_job(lambda: provider.fn(*leaves), leaves, setting.tensors(seed, (n, f)), phase)


def bytes_moved(shape: Shape, dtype: torch.dtype, phase: str) -> int:
    """Return the bytes that a phase moves, by the formula in the module docstring."""
    n, f = shape
    return of_phase(phase, (2 * n * f + f) * dtype.itemsize, (3 * n * f + 2 * f) * dtype.itemsize)


def of_model(c: ModelConfig, batch: int, block: int) -> tuple[Shape, dict[str, Any]] | None:
    """Return the shape of the MLP's activation."""
    if c.activation in GATED or c.activation == "relu2":
        return None
    return (batch * block, c.d_mlp), {"approximate": "tanh" if c.activation == "gelu_tanh" else "none"}


BENCH = Bench(
    "bias_gelu",
    "NxF",
    functools.partial(ops.bias_gelu, approximate="tanh"),
    Provider("torch", plain),
    job,
    bytes_moved,
    of_model,
    shapes={"cpu": ((1024, 3072),), "cuda": ((65536, 3072), (8192, 14336))},
    tiny=(1, 8),
    gate_cases=lambda shape: [((min(shape[0], 64), shape[1]), {"approximate": a}) for a in ("none", "tanh")],
    others=lambda setting: installed(setting, flash_attn=flash_attn),
)
pytest_generate_tests, test_bias_gelu = _op.pytest_generate_tests, _op.run_benchmark

if __name__ == "__main__":
    sys.exit(run_command(lambda: _command.main(BENCH)))
