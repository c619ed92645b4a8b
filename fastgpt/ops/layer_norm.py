"""LayerNorm, with the residual add in the same pass (Ba, Kiros, Hinton 2016, arXiv:1607.06450).

    s = x + x_bias + residual (rounded to x's dtype; s = x without residual)
    y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias

Forward reads x (and residual) once and writes y (and s) once. Backward reads dy and s once; x and residual receive the
same gradient, and x_bias its sum over the rows, from the same pass.

x_bias is for the bias of the linear layer that computed x: its gradient would otherwise take another read of dx.

Saved for backward: s in x's dtype, mean and 1 / sqrt(var + eps) in fp32.

Determinism: bitwise. dweight, dbias and dx_bias are summed in a fixed order, without atomics.

Limits: weight and bias share one dtype, x's or fp32; x_bias has either. First derivatives only.
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
    bias: Tensor | None,
    eps: float,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    return norm_outputs(x, residual, stats=(2,))


def _bwd_fake(
    dy: Tensor,
    dsum: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    x_bias: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    return contiguous_like(h, weight, bias, x_bias)


LAYER_NORM_FWD = define(
    "layer_norm",
    "layer_norm_fwd",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, Tensor? x_bias=None) "
    "-> (Tensor, Tensor?, Tensor)",
    _fwd_fake,
)
LAYER_NORM_BWD = define(
    "layer_norm",
    "layer_norm_bwd",
    "(Tensor dy, Tensor? dsum, Tensor h, Tensor? weight, Tensor? bias, Tensor stats, Tensor? x_bias=None) "
    "-> (Tensor, Tensor?, Tensor?, Tensor?)",
    _bwd_fake,
)


def layer_norm_ref(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    x_bias: Tensor | None = None,
) -> Any:
    """Compute the formula at the head of this file, with statistics in fp32 (fp64 for fp64 input). The parity tests
    take it as the truth."""
    s = add_residual(x, residual, x_bias)
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    y = (y if bias is None else y + bias).to(s.dtype)
    return y if residual is None else (y, s)


def layer_norm_torch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    x_bias: Tensor | None = None,
) -> Any:
    """Serve the `torch` backend and the parity baseline: PyTorch's op if it supports these dtypes, else the formula."""
    if any(t is not None and t.dtype != x.dtype for t in (weight, bias, x_bias)):
        return layer_norm_ref(x, weight, bias, eps, residual=residual, x_bias=x_bias)
    s = x if x_bias is None else x + x_bias
    s = s if residual is None else s + residual
    y = F.layer_norm(s, (x.shape[-1],), weight, bias, eps)
    return y if residual is None else (y, s)


class LayerNormFn(torch.autograd.Function):
    """Autograd over the raw ops: (backend, x, residual, weight, bias, eps, x_bias) -> (y, s or None)."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        x_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        y, s, stats = LAYER_NORM_FWD[backend](x, residual, weight, bias, eps, x_bias)
        ctx.backend = backend
        ctx.has_residual = residual is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if s is None else s, weight, bias, stats, x_bias if ctx.needs_input_grad[6] else None)
        return y, s

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        h, weight, bias, stats, x_bias = ctx.saved_tensors
        if dy is None:  # only x + residual has been used
            dx, dweight, dbias = dsum, None, None
            dx_bias = None if dsum is None or x_bias is None else row_sum(dsum, x_bias)
        else:
            dx, dweight, dbias, dx_bias = LAYER_NORM_BWD[ctx.backend](dy, dsum, h, weight, bias, stats, x_bias)
        return None, dx, dx if ctx.has_residual else None, dweight, dbias, None, dx_bias


def _check(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, x_bias: Tensor | None
) -> None:
    check_norm("layer_norm", x, residual, x_bias, weight=weight, bias=bias)
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise TypeError(f"layer_norm: bias is {bias.dtype}, expected {weight.dtype} as weight")


def _error(backend: str, device: torch.device, dtype: torch.dtype, n_cols: int, with_x_bias: bool) -> float:
    x, residual, dy, dsum = torch.randn(4, 9, n_cols, device=device).to(dtype).unbind()
    weight, bias, x_bias = torch.randn(3, n_cols, device=device).to(dtype).unbind()
    given = x_bias if with_x_bias else None
    y, s, stats = LAYER_NORM_FWD[backend](x, residual, weight, bias, 1e-5, given)
    got = [y, s, *LAYER_NORM_BWD[backend](dy, dsum, s, weight, bias, stats, given)]

    def exact(x: Tensor, weight: Tensor, bias: Tensor, *x_bias: Tensor) -> Any:
        return layer_norm_ref(x, weight, bias, residual=residual.double(), x_bias=x_bias[0] if x_bias else None)

    leaves = (x, weight, bias, x_bias) if with_x_bias else (x, weight, bias)
    return relative_error([t for t in got if t is not None], fp64_results(exact, leaves, (dy, dsum)))


def _self_check(backend: str, device: torch.device) -> float:
    wide = (768, 1600) if backend == "cuda" else ()  # two more kernels: 16-byte accesses, one and two warps a row
    errors = [_error(backend, device, torch.bfloat16, n, x_bias) for n in wide for x_bias in (False, True)]
    return max(_error(backend, device, torch.float32, 130, True), *errors, 0.0)


register("layer_norm", _self_check, cuda=Cell(), triton=Cell(), cpu=Cell())


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: None = None,
    x_bias: Tensor | None = None,
) -> Tensor: ...


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    x_bias: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension, optionally of `x + residual`.

    Args:
        x: (..., C), any strides; fp32, bf16, fp16 (fp64 on the reference).
        weight, bias: (C,), x's dtype or fp32, or None.
        eps: added to the variance.
        residual: x's shape and dtype; added first, rounded to x's dtype.
        x_bias: (C,), x's dtype or fp32, or None; added to x together with the residual, which it needs.

    Returns:
        y (..., C) in x's dtype; with `residual` the pair (y, x + x_bias + residual). Statistics are fp32.

    Raises:
        ValueError, TypeError: with the argument, the value received and the value expected.

    Example:
        >>> import torch
        >>> from fastgpt import ops
        >>> x, residual = torch.randn(2, 8, 64)
        >>> y, s = ops.layer_norm(x, torch.ones(64), residual=residual)
        >>> torch.equal(s, x + residual)
        True

    Source: Ba, Kiros, Hinton 2016 (arXiv:1607.06450).
    """
    _check(x, weight, bias, residual, x_bias)
    backend = select("layer_norm", x)
    if backend == "torch":
        return layer_norm_torch(x, weight, bias, eps, residual=residual, x_bias=x_bias)
    if needs_grad(x, residual, weight, bias, x_bias):
        y, s = LayerNormFn.apply(backend, x, residual, weight, bias, eps, x_bias)
    else:
        y, s, _ = LAYER_NORM_FWD[backend](x, residual, weight, bias, eps, x_bias)
    return y if residual is None else (y, s)
