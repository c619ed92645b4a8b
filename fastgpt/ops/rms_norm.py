"""RMSNorm, with the residual add in the same pass (Zhang, Sennrich 2019, arXiv:1910.07467).

    s = x + x_bias + residual (rounded to x's dtype; s = x without residual)
    y = s / sqrt(mean(s^2) + eps) * (weight_offset + weight)

    rstd = 1 / sqrt(mean(s^2) + eps),  n = s * rstd,  g = dy * (weight_offset + weight)
    dx = rstd * (g - n * mean(g * n))

Forward reads x (and residual) once and writes y (and s) once. Backward reads dy and s once; x and residual receive the
same gradient, and x_bias its sum over the rows, from the same pass. With one column the difference in dx is
g * eps * rstd^2, which fp32 would lose to cancellation, so the kernels compute that product.

x_bias is for the bias of the linear layer that computed x: its gradient would otherwise take another read of dx.

Saved for backward: s in x's dtype, rstd in fp32.

Determinism: bitwise. dweight and dx_bias are summed in a fixed order, without atomics.

Limits: the dtypes of the weight and of x_bias are x's or fp32. First derivatives only.
"""

from __future__ import annotations

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.core.backend import Cell, register, select
from fastgpt.ops._common import contiguous_like, define, fp64_results, needs_grad, relative_error
from fastgpt.ops._norm import add_residual, check_norm, norm_outputs, row_sum


def _fwd_fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    return norm_outputs(x, residual, stats=())


def _bwd_fake(
    dy: Tensor,
    dsum: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    eps: float,
    weight_offset: float,
    x_bias: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    return contiguous_like(h, weight, x_bias)


RMS_NORM_FWD = define(
    "rms_norm",
    "rms_norm_fwd",
    "(Tensor x, Tensor? residual, Tensor? weight, float eps, float weight_offset, Tensor? x_bias=None) "
    "-> (Tensor, Tensor?, Tensor)",
    _fwd_fake,
)
RMS_NORM_BWD = define(
    "rms_norm",
    "rms_norm_bwd",
    "(Tensor dy, Tensor? dsum, Tensor h, Tensor? weight, Tensor rstd, float eps, float weight_offset, "
    "Tensor? x_bias=None) -> (Tensor, Tensor?, Tensor?)",
    _bwd_fake,
)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    x_bias: Tensor | None = None,
) -> Any:
    """Compute the formula at the head of this file, with statistics in fp32 (fp64 for fp64 input). The parity tests
    take it as the truth."""
    s = add_residual(x, residual, x_bias)
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
    x_bias: Tensor | None = None,
) -> Any:
    """Serve the `torch` backend and the parity baseline: PyTorch's op if it supports these dtypes, else the formula."""
    mixed = any(t is not None and t.dtype != x.dtype for t in (weight, x_bias))
    if mixed or (weight is not None and weight_offset != 0.0):
        return rms_norm_ref(x, weight, eps, residual=residual, weight_offset=weight_offset, x_bias=x_bias)
    s = x if x_bias is None else x + x_bias
    s = s if residual is None else s + residual
    y = F.rms_norm(s, (x.shape[-1],), weight, eps)
    return y if residual is None else (y, s)


class RMSNormFn(torch.autograd.Function):
    """Autograd over the raw ops: (backend, x, residual, weight, eps, weight_offset, x_bias) -> (y, s or None)."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        eps: float,
        weight_offset: float,
        x_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        y, s, rstd = RMS_NORM_FWD[backend](x, residual, weight, eps, weight_offset, x_bias)
        ctx.backend = backend
        ctx.has_residual = residual is not None
        ctx.eps, ctx.weight_offset = eps, weight_offset
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if s is None else s, weight, rstd, x_bias if ctx.needs_input_grad[6] else None)
        return y, s

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        h, weight, rstd, x_bias = ctx.saved_tensors
        if dy is None:  # only x + residual was used
            dx, dweight = dsum, None
            dx_bias = None if dsum is None or x_bias is None else row_sum(dsum, x_bias)
        else:
            scalars = (ctx.eps, ctx.weight_offset)
            dx, dweight, dx_bias = RMS_NORM_BWD[ctx.backend](dy, dsum, h, weight, rstd, *scalars, x_bias)
        return None, dx, dx if ctx.has_residual else None, dweight, None, None, dx_bias


def _error(backend: str, device: torch.device, dtype: torch.dtype, n_cols: int, with_x_bias: bool) -> float:
    x, residual, dy, dsum = torch.randn(4, 9, n_cols, device=device).to(dtype).unbind()
    weight, x_bias = torch.randn(2, n_cols, device=device).to(dtype).unbind()
    given = x_bias if with_x_bias else None
    y, s, rstd = RMS_NORM_FWD[backend](x, residual, weight, 1e-6, 1.0, given)
    got = [y, s, *RMS_NORM_BWD[backend](dy, dsum, s, weight, rstd, 1e-6, 1.0, given)]

    def exact(x: Tensor, weight: Tensor, *x_bias: Tensor) -> Any:
        added = x_bias[0] if x_bias else None
        return rms_norm_ref(x, weight, residual=residual.double(), weight_offset=1.0, x_bias=added)

    leaves = (x, weight, x_bias) if with_x_bias else (x, weight)
    return relative_error([t for t in got if t is not None], fp64_results(exact, leaves, (dy, dsum)))


def _self_check(backend: str, device: torch.device) -> float:
    wide = (768, 4096) if backend == "cuda" else ()  # two more kernels: 16-byte accesses, one and four warps a row
    errors = [_error(backend, device, torch.bfloat16, n, x_bias) for n in wide for x_bias in (False, True)]
    return max(_error(backend, device, torch.float32, 130, True), *errors, 0.0)


register("rms_norm", _self_check, cuda=Cell(), triton=Cell(), cpu=Cell())


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: None = None,
    weight_offset: float = 0.0,
    x_bias: Tensor | None = None,
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor,
    weight_offset: float = 0.0,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    x_bias: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension, optionally of `x + residual`.

    Args:
        x: (..., C), any strides; fp32, bf16, fp16 (fp64 on the reference).
        weight: (C,), x's dtype or fp32, or None.
        eps: added to the mean of squares.
        residual: x's shape and dtype; added first, rounded to x's dtype.
        weight_offset: 1.0 for weights stored as a difference from one (Gemma); ignored without a weight.
        x_bias: (C,), x's dtype or fp32, or None; added to x together with the residual, which it needs.

    Returns:
        y (..., C) in x's dtype; with `residual` the pair (y, x + x_bias + residual). Statistics are fp32.

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
    check_norm("rms_norm", x, residual, x_bias, weight=weight)
    backend = select("rms_norm", x)
    if backend == "torch":
        return rms_norm_torch(x, weight, eps, residual=residual, weight_offset=weight_offset, x_bias=x_bias)
    if needs_grad(x, residual, weight, x_bias):
        y, s = RMSNormFn.apply(backend, x, residual, weight, eps, weight_offset, x_bias)
    else:
        y, s, _ = RMS_NORM_FWD[backend](x, residual, weight, eps, weight_offset, x_bias)
    return y if residual is None else (y, s)
