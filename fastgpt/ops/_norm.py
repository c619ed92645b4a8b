"""Helpers of layer_norm and rms_norm: argument checks, the sum with the residual, the fake of the forward raw op."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.ops._common import check_float, check_like


def check_norm(op: str, x: Tensor, residual: Tensor | None, x_bias: Tensor | None, **params: Tensor | None) -> None:
    """Raise unless x is (..., C), residual is like x, and x_bias and the parameters are (C,) in x's dtype or fp32.

    x_bias needs a residual.
    """
    check_float(op, "x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (..., C) with C >= 1")
    if x_bias is not None and residual is None:
        raise ValueError(f"{op}: x_bias without residual, expected both or x + x_bias as x")
    for name, param in {"x_bias": x_bias, **params}.items():
        check_like(op, name, param, (x.shape[-1],), x, (x.dtype, torch.float32), "to match x's last dimension")
    check_like(op, "residual", residual, tuple(x.shape), x, (x.dtype,), "as x")


def add_residual(x: Tensor, residual: Tensor | None, x_bias: Tensor | None) -> Tensor:
    """Return x + x_bias + residual, computed in fp32 (fp64 for fp64 input) and rounded once to x's dtype."""
    if residual is None or x_bias is None:
        return x if residual is None else x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) + x_bias + residual).to(x.dtype)


def row_sum(dx: Tensor, x_bias: Tensor) -> Tensor:
    """Return the gradient of x_bias (C) from dx (..., C), for a backward that has no kernel to run."""
    rows = dx.reshape(-1, dx.shape[-1])
    return rows.sum(0, dtype=torch.float32).to(x_bias.dtype)


def norm_outputs(x: Tensor, residual: Tensor | None, stats: tuple[int, ...]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return new y, x + x_bias + residual (None without a residual) and fp32 statistics of shape (*stats, N)."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, None if residual is None else torch.empty_like(y), x.new_empty((*stats, rows), dtype=torch.float32)
