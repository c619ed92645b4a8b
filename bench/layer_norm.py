"""LayerNorm with residual, s = x + residual, y = norm(s) weight + bias, at (N, C).

Bytes, e per element of x, n = N C (what a norm must move; weights and statistics are counted, too):
    forward   reads x, residual; writes y, s           4 n e + 2 C e + 8 N
    backward  reads dy, ds, s; writes dx               4 n e + 4 C e + 8 N
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.bench import _command, _op
from fastgpt.bench._op import Bench, Job, Provider, Setting, Shape, autograd_job, installed, of_phase
from fastgpt.core.command import run_command
from fastgpt.models.config import ModelConfig
from fastgpt.ops.layer_norm import layer_norm_torch


def job(provider: Provider, setting: Setting, phase: str, seed: int) -> Job:
    """Return one call over its own x, residual, weight, bias and upstream gradients."""
    n, c = setting.shape
    leaves = x, residual, weight, bias = setting.tensors(seed, (n, c), (n, c), (c,), (c,), grad=True)
    grads = setting.tensors(seed, (n, c), (n, c))
    return autograd_job(lambda: provider.fn(x, weight, bias, 1e-5, residual=residual), leaves, grads, phase)


def bytes_moved(shape: Shape, dtype: torch.dtype, phase: str) -> int:
    """Return the bytes that a phase moves, by the formula in the module docstring."""
    n, c = shape
    forward = (4 * n * c + 2 * c) * dtype.itemsize + 8 * n
    return of_phase(phase, forward, forward + 2 * c * dtype.itemsize)


def of_model(c: ModelConfig, batch: int, block: int) -> tuple[Shape, dict[str, Any]] | None:
    """Return the shape of the residual stream's norms."""
    return ((batch * block, c.width), {}) if c.norm == "layer" else None


def liger(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Add, then call Liger-Kernel."""
    from liger_kernel.transformers.functional import liger_layer_norm

    s = x + residual
    return liger_layer_norm(s, weight, bias, eps), s


def flash_attn(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Call flash-attn, which includes the add."""
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    return layer_norm_fn(x, weight, bias, residual=residual, eps=eps, prenorm=True)


def apex(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Add, then call apex."""
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    s = x + residual
    return fused_layer_norm_affine(s, weight, bias, weight.shape, eps), s


BENCH = Bench(
    "layer_norm",
    "NxC",
    ops.layer_norm,
    Provider("torch", layer_norm_torch),
    job,
    bytes_moved,
    of_model,
    shapes={"cpu": ((1024, 768),), "cuda": ((65536, 768), (8192, 4096))},
    tiny=(1, 8),
    gate_cases=lambda shape: [((min(shape[0], 64), shape[1]), {"residual": True})],
    others=lambda setting: installed(setting, liger_kernel=liger, flash_attn=flash_attn, apex=apex),
)
pytest_generate_tests, test_layer_norm = _op.pytest_generate_tests, _op.run_benchmark

if __name__ == "__main__":
    sys.exit(run_command(lambda: _command.main(BENCH)))
