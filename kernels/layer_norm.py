"""LayerNorm with residual add, forward and backward (Ba, Kiros, Hinton 2016, arXiv:1607.06450).

    h = x + x_bias + residual (rounded to x's dtype),  mean = sum(h) / C,  var = sum((h - mean)^2) / C
    rstd = 1 / sqrt(var + eps),  n = (h - mean) * rstd,  y = n * weight + bias
    g = dy * weight,  dx = rstd * (g - sum(g) / C - n * sum(g * n) / C) + dsum
    dweight = sum_N(dy * n),  dbias = sum_N(dy),  dx_bias = sum_N(dx)

Fused: add, norm and affine in one pass; dx and the parameter gradients in one pass and a small reduce.
Bytes an element: forward reads x (and residual), writes y (and sum); backward reads dy, h (and dsum), writes dx.
Saved for backward: h in x's dtype, mean and rstd in fp32.
Launchers, column blocks of wide rows and the sums of gradients are in kernels/_norm.py. Results are bitwise
deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _norm
from ._norm import load_sum, store_dx
from ._runtime import Configuration, cast, jit_kernel


@triton.jit
def _affine(n, weight_ptr, bias_ptr, c, mask):
    """Return n * weight + bias in fp32; weight and bias may be None."""
    if weight_ptr is not None:
        n *= tl.load(weight_ptr + c, mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        n += tl.load(bias_ptr + c, mask, other=0.0).to(tl.float32)
    return n


@jit_kernel(do_not_specialize=["N", "eps"])
def layer_norm_fwd_kernel(
    x_ptr,  # (N, C), rows x_row apart
    residual_ptr,  # (N, C) or None
    x_bias_ptr,  # (C) or None
    weight_ptr,  # (C) or None
    bias_ptr,  # (C) or None
    y_ptr,  # (N, C) contiguous
    sum_ptr,  # (N, C) contiguous, or None without residual
    stats_ptr,  # (2, N): mean, rstd
    x_row, residual_row, N, C, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalise ROWS rows per program, each in one piece of BLOCK >= C columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    c = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    in_row = c < C
    mask = (row < N) & in_row
    h = load_sum(x_ptr, residual_ptr, x_bias_ptr, sum_ptr, row, x_row, residual_row, C, c, mask)
    mean = tl.sum(h, axis=1, keep_dims=True) / C  # (ROWS, 1)
    d = tl.where(mask, h - mean, 0.0)
    var = tl.sum(d * d, axis=1, keep_dims=True) / C
    rstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    tl.store(stats_ptr + row, mean, row < N)
    tl.store(stats_ptr + N + row, rstd, row < N)
    y = _affine(d * rstd, weight_ptr, bias_ptr, c, in_row)
    tl.store(y_ptr + row * C + c, cast(y, y_ptr.dtype.element_ty), mask)


@jit_kernel(do_not_specialize=["N", "eps"])
def layer_norm_fwd_wide_kernel(
    x_ptr,  # (N, C), rows x_row apart
    residual_ptr,  # (N, C) or None
    x_bias_ptr,  # (C) or None
    weight_ptr,  # (C) or None
    bias_ptr,  # (C) or None
    y_ptr,  # (N, C) contiguous
    sum_ptr,  # (N, C) contiguous, or None without residual
    stats_ptr,  # (2, N): mean, rstd
    x_row, residual_row, N, C, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalise one row per program in blocks of BLOCK columns, in three passes: mean, variance, output."""
    row = tl.program_id(0).to(tl.int64)
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        acc += load_sum(x_ptr, residual_ptr, x_bias_ptr, sum_ptr, row, x_row, residual_row, C, c, c < C)
    mean = tl.sum(acc, axis=0) / C
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        # add again instead of reading the sum, which another thread of this program may have written
        d = load_sum(x_ptr, residual_ptr, x_bias_ptr, None, row, x_row, residual_row, C, c, c < C) - mean
        d = tl.where(c < C, d, 0.0)
        acc += d * d
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(acc, axis=0) / C + eps))
    tl.store(stats_ptr + row, mean)
    tl.store(stats_ptr + N + row, rstd)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        d = load_sum(x_ptr, residual_ptr, x_bias_ptr, None, row, x_row, residual_row, C, c, c < C) - mean
        y = _affine(d * rstd, weight_ptr, bias_ptr, c, c < C)
        tl.store(y_ptr + row * C + c, cast(y, y_ptr.dtype.element_ty), c < C)


@triton.jit
def _load_grads(dy_ptr, h_ptr, weight_ptr, row, dy_row, h_row, c, mask, in_row, mean, rstd):
    """Load one tile; return dy, n and g = dy * weight in fp32, zero where masked."""
    dy = tl.load(dy_ptr + row * dy_row + c, mask, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + row * h_row + c, mask, other=0.0).to(tl.float32)
    n = tl.where(mask, (h - mean) * rstd, 0.0)
    g = dy
    if weight_ptr is not None:
        g = dy * tl.load(weight_ptr + c, in_row, other=0.0).to(tl.float32)
    return dy, n, g


@jit_kernel(do_not_specialize=["N"])
def layer_norm_bwd_kernel(
    dy_ptr,  # (N, C), rows dy_row apart
    dsum_ptr,  # (N, C), rows dsum_row apart, or None
    h_ptr,  # (N, C), rows h_row apart
    weight_ptr,  # (C) or None
    stats_ptr,  # (2, N)
    dx_ptr,  # (N, C) contiguous
    partials_ptr,  # (programs, 2, C): dweight, dbias; with X_BIAS (programs, 3, C): dx_bias, too; or None
    dy_row, dsum_row, h_row, N, C, X_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program p computes row tiles p, p + programs, ... and keeps its partial sums in registers."""
    c = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    in_row = c < C
    dweight = tl.zeros([1, BLOCK], tl.float32)
    dbias = tl.zeros([1, BLOCK], tl.float32)
    dx_bias = tl.zeros([1, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)  # (ROWS, 1)
        mask = (row < N) & in_row
        mean = tl.load(stats_ptr + row, row < N, other=0.0)
        rstd = tl.load(stats_ptr + N + row, row < N, other=0.0)
        if BLOCK == 1:
            # dx of one column is 0, but an FMA (dy * weight - mean_g) leaves a rounding error, and rstd multiplies it
            rstd = tl.zeros_like(rstd)
        dy, n, g = _load_grads(dy_ptr, h_ptr, weight_ptr, row, dy_row, h_row, c, mask, in_row, mean, rstd)
        if partials_ptr is not None:
            dweight += tl.sum(dy * n, axis=0, keep_dims=True)
            dbias += tl.sum(dy, axis=0, keep_dims=True)
        mean_g = tl.sum(g, axis=1, keep_dims=True) / C
        mean_gn = tl.sum(g * n, axis=1, keep_dims=True) / C
        dx = rstd * (g - mean_g - n * mean_gn)
        dx = store_dx(dx, dx_ptr, dsum_ptr, row, dsum_row, C, c, mask)
        if X_BIAS:
            dx_bias += tl.sum(dx, axis=0, keep_dims=True)
    if partials_ptr is not None:
        out = partials_ptr + tl.program_id(0).to(tl.int64) * (3 if X_BIAS else 2) * C + c
        tl.store(out, dweight, in_row)
        tl.store(out + C, dbias, in_row)
        if X_BIAS:
            tl.store(out + 2 * C, dx_bias, in_row)


@jit_kernel(do_not_specialize=["N"])
def layer_norm_dx_wide_kernel(
    dy_ptr,  # (N, C), rows dy_row apart
    dsum_ptr,  # (N, C), rows dsum_row apart, or None
    h_ptr,  # (N, C), rows h_row apart
    weight_ptr,  # (C) or None
    stats_ptr,  # (2, N)
    dx_ptr,  # (N, C) contiguous
    dy_row, dsum_row, h_row, N, C, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute dx of one row per program in blocks of BLOCK columns, in two passes: the two sums, dx."""
    row = tl.program_id(0).to(tl.int64)
    mean = tl.load(stats_ptr + row)
    rstd = tl.load(stats_ptr + N + row)
    sum_g = tl.zeros([BLOCK], tl.float32)
    sum_gn = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        dy, n, g = _load_grads(dy_ptr, h_ptr, weight_ptr, row, dy_row, h_row, c, c < C, c < C, mean, rstd)
        sum_g += g
        sum_gn += g * n
    mean_g = tl.sum(sum_g, axis=0) / C
    mean_gn = tl.sum(sum_gn, axis=0) / C
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        dy, n, g = _load_grads(dy_ptr, h_ptr, weight_ptr, row, dy_row, h_row, c, c < C, c < C, mean, rstd)
        dx = rstd * (g - mean_g - n * mean_gn)
        store_dx(dx, dx_ptr, dsum_ptr, row, dsum_row, C, c, c < C)


LAYER_NORM = _norm.Norm(
    fwd=layer_norm_fwd_kernel,
    fwd_wide=layer_norm_fwd_wide_kernel,
    bwd=layer_norm_bwd_kernel,
    dx_wide=layer_norm_dx_wide_kernel,
    mean=True,
    fwd_elements=4096,
    wide_warps=8,
)


def layer_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return y, x + x_bias + residual (None without a residual) and (mean, rstd) of shape (2, N)."""
    stats = torch.empty((2, math.prod(x.shape[:-1])), dtype=torch.float32, device=x.device)
    y, total = _norm.forward(LAYER_NORM, x, residual, x_bias, (weight, bias), stats, eps)
    return y, total, stats


def layer_norm_bwd(
    dy: Tensor,
    dsum: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return dx, which is also the gradient of the residual, dweight, dbias and dx_bias (None if the parameter is
    None)."""
    return _norm.backward(LAYER_NORM, dy, dsum, h, weight, bias, stats, x_bias)


def configurations(dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Iterator[Configuration]:
    """Yield every launch shape of LayerNorm."""
    return _norm.configurations(LAYER_NORM, dtype, weight_dtype)
