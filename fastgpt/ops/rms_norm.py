"""RMSNorm, with the residual add (Zhang, Sennrich 2019, arXiv:1910.07467).

s = x + residual          (rounded to x's dtype; s = x without residual)
y = s / sqrt(mean(s^2) + eps) * (weight_offset + weight)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt.backend import register, select
from fastgpt.ops._common import check_float, check_like

register("rms_norm")


def rms_norm_ref(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Any:
    """The formula at this file's head; statistics in fp32 (fp64 for fp64 input)."""
    s = x if residual is None else x + residual
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * (weight.to(y.dtype) + weight_offset)
    return y.to(s.dtype) if residual is None else (y.to(s.dtype), s)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Any:
    """RMSNorm over the last dimension, optionally of `x + residual`.

    Args:
        x: (..., C); weight: (C,) in x's dtype or fp32, or None; residual: as x, added first.
        weight_offset: 1.0 for weights stored as a difference from one (Gemma).

    Returns:
        y (..., C) in x's dtype; with `residual` the pair (y, x + residual).

    Raises:
        ValueError, TypeError: naming the argument. Source: arXiv:1910.07467.
    """
    check_float("rms_norm", "x", x)
    dtypes = (x.dtype, torch.float32)
    check_like("rms_norm", "weight", weight, (x.shape[-1],), x, dtypes, "to match x's last dimension")
    check_like("rms_norm", "residual", residual, tuple(x.shape), x, (x.dtype,), "as x")
    select("rms_norm", x)
    return rms_norm_ref(x, weight, eps, residual=residual, weight_offset=weight_offset)
