"""bias + GELU (Hendrycks, Gimpel 2016, arXiv:1606.08415): gelu(x + bias), exact (erf) or by tanh (GPT-2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.backend import register, select
from fastgpt.ops._common import check_float, check_like

register("bias_gelu")


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    """gelu(x + bias).

    Args:
        x: (..., F); bias: (F,) in x's dtype or fp32, or None.
        approximate: "none" (erf) or "tanh" (GPT-2's).

    Returns:
        (..., F) in x's dtype.

    Raises:
        ValueError, TypeError: naming the argument. Source: arXiv:1606.08415.
    """
    check_float("bias_gelu", "x", x)
    dtypes = (x.dtype, torch.float32)
    check_like("bias_gelu", "bias", bias, (x.shape[-1],), x, dtypes, "to match x's last dimension")
    if approximate not in ("none", "tanh"):
        raise ValueError(f"bias_gelu: approximate is {approximate!r}, expected 'none' or 'tanh'")
    select("bias_gelu", x)
    return F.gelu(x if bias is None else x + bias, approximate=approximate).to(x.dtype)
