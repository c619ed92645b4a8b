"""RMSNorm with residual, s = x + residual, y = norm(s) weight, at (N, C).

Bytes, e per element of x, n = N C (weights and statistics are counted, too):
    forward   reads x, residual; writes y, s           4 n e +   C e + 4 N
    backward  reads dy, ds, s; writes dx               4 n e + 2 C e + 4 N
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
from fastgpt.ops.rms_norm import rms_norm_torch


def job(provider: Provider, setting: Setting, phase: str, seed: int) -> Job:
    """Return one call over its own x, residual, weight and upstream gradients."""
    n, c = setting.shape
    leaves = x, residual, weight = setting.tensors(seed, (n, c), (n, c), (c,), grad=True)
    grads = setting.tensors(seed, (n, c), (n, c))
    return autograd_job(lambda: provider.fn(x, weight, 1e-6, residual=residual), leaves, grads, phase)


def bytes_moved(shape: Shape, dtype: torch.dtype, phase: str) -> int:
    """Return the bytes that a phase moves, by the formula in the module docstring."""
    n, c = shape
    forward = (4 * n * c + c) * dtype.itemsize + 4 * n
    return of_phase(phase, forward, forward + c * dtype.itemsize)


def of_model(c: ModelConfig, batch: int, block: int) -> tuple[Shape, dict[str, Any]] | None:
    """Return the shape of the residual stream's norms."""
    return ((batch * block, c.width), {}) if c.norm == "rms" else None


def liger(x: Tensor, weight: Tensor, eps: float, *, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Call Liger-Kernel; not in place, since its gradients are computed repeatedly."""
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    return liger_fused_add_rms_norm(x, residual, weight, eps, in_place=False)


def quack(x: Tensor, weight: Tensor, eps: float, *, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Call quack."""
    from quack import rmsnorm

    return rmsnorm(x, weight, residual=residual, eps=eps, prenorm=True)


def flash_attn(x: Tensor, weight: Tensor, eps: float, *, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Call flash-attn, which includes the add."""
    from flash_attn.ops.triton.layer_norm import rms_norm_fn

    return rms_norm_fn(x, weight, None, residual=residual, eps=eps, prenorm=True)


def apex(x: Tensor, weight: Tensor, eps: float, *, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Add, then call apex."""
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    s = x + residual
    return fused_rms_norm_affine(s, weight, weight.shape, eps), s


BENCH = Bench(
    "rms_norm",
    "NxC",
    ops.rms_norm,
    Provider("torch", rms_norm_torch),
    job,
    bytes_moved,
    of_model,
    shapes={"cpu": ((1024, 768),), "cuda": ((65536, 768), (8192, 4096))},
    tiny=(1, 8),
    gate_cases=lambda shape: [((min(shape[0], 64), shape[1]), {"residual": True})],
    others=lambda setting: installed(setting, liger_kernel=liger, quack=quack, flash_attn=flash_attn, apex=apex),
)
pytest_generate_tests, test_rms_norm = _op.pytest_generate_tests, _op.run_benchmark

if __name__ == "__main__":
    sys.exit(run_command(lambda: _command.main(BENCH)))
