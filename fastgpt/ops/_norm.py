"""Helpers of layer_norm and rms_norm: the argument checks and the fake of the forward raw op."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.ops._common import check_float, check_like


def check_norm(op: str, x: Tensor, residual: Tensor | None, **params: Tensor | None) -> None:
    """Raise unless x is (..., C), residual is like x, and each parameter is (C,) in x's dtype or fp32."""
    check_float(op, "x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (..., C) with C >= 1")
    for name, param in params.items():
        check_like(op, name, param, (x.shape[-1],), x, (x.dtype, torch.float32), "to match x's last dimension")
    check_like(op, "residual", residual, tuple(x.shape), x, (x.dtype,), "as x")


def norm_outputs(x: Tensor, residual: Tensor | None, stats: tuple[int, ...]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return new y, x + residual (None without a residual) and fp32 statistics of shape (*stats, N)."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, None if residual is None else torch.empty_like(y), x.new_empty((*stats, rows), dtype=torch.float32)
