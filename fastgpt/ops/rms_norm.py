"""RMSNorm, with the residual add in the same pass (Zhang, Sennrich 2019, arXiv:1910.07467).

    s = x + residual          (rounded to x's dtype; s = x without residual)
    y = s / sqrt(mean(s^2) + eps) * (weight_offset + weight)

    rstd = 1 / sqrt(mean(s^2) + eps),  n = s * rstd,  g = dy * (weight_offset + weight)
    dx = rstd * (g - n * mean(g * n))

Forward reads x (and residual) once and writes y (and s) once. Backward reads dy and s once; x and residual receive the
same gradient. With one column the difference in dx is g * eps * rstd^2, which fp32 would lose to cancellation, so the
kernels compute that product.

Saved for backward: s in x's dtype, rstd in fp32.

Determinism: bitwise. dweight is summed in a fixed order, without atomics.

Limits: the weight's dtype is x's or fp32. First derivatives only.
"""

from __future__ import annotations

from functools import partial
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.core.backend import Cell, register, select
from fastgpt.ops._common import contiguous_like, define, fp64_results, needs_grad, relative_error
from fastgpt.ops._norm import check_norm, norm_outputs


def _fwd_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    return norm_outputs(x, residual, stats=())


def _bwd_fake(
    dy: Tensor, dsum: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor | None, ...]:
    return contiguous_like(h, weight)


RMS_NORM_FWD = define(
    "rms_norm",
    "rms_norm_fwd",
    "(Tensor x, Tensor? residual, Tensor? weight, float eps, float weight_offset) -> (Tensor, Tensor?, Tensor)",
    _fwd_fake,
)
RMS_NORM_BWD = define(
    "rms_norm",
    "rms_norm_bwd",
    "(Tensor dy, Tensor? dsum, Tensor h, Tensor? weight, Tensor rstd, float eps, float weight_offset) "
    "-> (Tensor, Tensor?)",
    _bwd_fake,
)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Any:
    """Compute the formula at the head of this file, with statistics in fp32 (fp64 for fp64 input). The parity tests
    take it as the truth."""
    s = x if residual is None else x + residual
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * (weight.to(y.dtype) + weight_offset)
    return y.to(s.dtype) if residual is None else (y.to(s.dtype), s)


def rms_norm_torch(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Any:
    """Serve the `torch` backend and the parity baseline: PyTorch's op if it supports these dtypes, else the formula."""
    if weight is not None and (weight.dtype != x.dtype or weight_offset != 0.0):
        return rms_norm_ref(x, weight, eps, residual=residual, weight_offset=weight_offset)
    s = x if residual is None else x + residual
    y = F.rms_norm(s, (x.shape[-1],), weight, eps)
    return y if residual is None else (y, s)


class RMSNormFn(torch.autograd.Function):
    """Autograd over the raw ops: (backend, x, residual, weight, eps, weight_offset) -> (y, s or None)."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        eps: float,
        weight_offset: float,
    ) -> tuple[Tensor, Tensor | None]:
        y, s, rstd = RMS_NORM_FWD[backend](x, residual, weight, eps, weight_offset)
        ctx.backend = backend
        ctx.has_residual = residual is not None
        ctx.eps, ctx.weight_offset = eps, weight_offset
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if s is None else s, weight, rstd)
        return y, s

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        h, weight, rstd = ctx.saved_tensors
        if dy is None:  # only x + residual was used
            dx, dweight = dsum, None
        else:
            dx, dweight = RMS_NORM_BWD[ctx.backend](dy, dsum, h, weight, rstd, ctx.eps, ctx.weight_offset)
        return None, dx, dx if ctx.has_residual else None, dweight, None, None


def _error(backend: str, device: torch.device, dtype: torch.dtype, n_cols: int) -> float:
    x, residual, dy, dsum = torch.randn(4, 9, n_cols, device=device).to(dtype).unbind()
    weight = torch.randn(n_cols, device=device).to(dtype)
    y, s, rstd = RMS_NORM_FWD[backend](x, residual, weight, 1e-6, 1.0)
    got = [y, s, *RMS_NORM_BWD[backend](dy, dsum, s, weight, rstd, 1e-6, 1.0)]
    exact = partial(rms_norm_ref, residual=residual.double(), weight_offset=1.0)
    return relative_error(got, fp64_results(exact, (x, weight), (dy, dsum)))


def _self_check(backend: str, device: torch.device) -> float:
    wide = (768, 4096) if backend == "cuda" else ()  # two more kernels: 16-byte accesses, one and four warps a row
    errors = [_error(backend, device, torch.bfloat16, n_cols) for n_cols in wide]
    return max(_error(backend, device, torch.float32, 130), *errors, 0.0)


register("rms_norm", _self_check, cuda=Cell(), triton=Cell(), cpu=Cell())


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: None = None,
    weight_offset: float = 0.0,
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, residual: Tensor, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension, optionally of `x + residual`.

    Args:
        x: (..., C), any strides; fp32, bf16, fp16 (fp64 on the reference).
        weight: (C,), x's dtype or fp32, or None.
        eps: added to the mean of squares.
        residual: x's shape and dtype; added first, rounded to x's dtype.
        weight_offset: 1.0 for weights stored as a difference from one (Gemma); ignored without a weight.

    Returns:
        y (..., C) in x's dtype; with `residual` the pair (y, x + residual). Statistics are fp32.

    Raises:
        ValueError, TypeError: with the argument, the value received and the value expected.

    Example:
        >>> import torch
        >>> from fastgpt import ops
        >>> x, weight = torch.randn(8, 64), torch.zeros(64)
        >>> y = ops.rms_norm(x, weight, weight_offset=1.0)
        >>> y.shape
        torch.Size([8, 64])

    Source: Zhang, Sennrich 2019 (arXiv:1910.07467).
    """
    check_norm("rms_norm", x, residual, weight=weight)
    backend = select("rms_norm", x)
    if backend == "torch":
        return rms_norm_torch(x, weight, eps, residual=residual, weight_offset=weight_offset)
    if needs_grad(x, residual, weight):
        y, s = RMSNormFn.apply(backend, x, residual, weight, eps, weight_offset)
    else:
        y, s, _ = RMS_NORM_FWD[backend](x, residual, weight, eps, weight_offset)
    return y if residual is None else (y, s)
