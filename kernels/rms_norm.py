"""RMSNorm with residual add, forward and backward (Zhang, Sennrich 2019, arXiv:1910.07467).

    h = x + x_bias + residual (rounded to x's dtype),  rstd = 1 / sqrt(sum(h^2) / C + eps),  n = h * rstd
    y = n * w,  w = weight + weight_offset in fp32
    g = dy * w,  dx = rstd * (g - n * sum(g * n) / C) + dsum
    dweight = sum_N(dy * n),  dx_bias = sum_N(dx)

Fused: add, norm and weight in one pass; dx and dweight in one pass and a small reduce.
Bytes an element: forward reads x (and residual), writes y (and sum); backward reads dy, h (and dsum), writes dx.
Saved for backward: h in x's dtype, rstd in fp32.
Rows, column blocks, partials and launchers are in kernels/_norm.py. Results are bitwise deterministic.
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
def _weighted(n, weight_ptr, weight_offset, c, mask):
    """Return n * (weight + offset) in fp32; n if there is no weight."""
    if weight_ptr is not None:
        n *= tl.load(weight_ptr + c, mask, other=0.0).to(tl.float32) + weight_offset
    return n


@jit_kernel(do_not_specialize=["N", "eps", "weight_offset"])
def rms_norm_fwd_kernel(
    x_ptr,  # (N, C), rows x_row apart
    residual_ptr,  # (N, C) or None
    x_bias_ptr,  # (C) or None
    weight_ptr,  # (C) or None
    y_ptr,  # (N, C) contiguous
    sum_ptr,  # (N, C) contiguous, or None without residual
    rstd_ptr,  # (N)
    x_row, residual_row, N, C, eps, weight_offset, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalise ROWS rows per program, each in one piece of BLOCK >= C columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    c = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    in_row = c < C
    mask = (row < N) & in_row
    h = load_sum(x_ptr, residual_ptr, x_bias_ptr, sum_ptr, row, x_row, residual_row, C, c, mask)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(h * h, axis=1, keep_dims=True) / C + eps))  # (ROWS, 1)
    tl.store(rstd_ptr + row, rstd, row < N)
    y = _weighted(h * rstd, weight_ptr, weight_offset, c, in_row)
    tl.store(y_ptr + row * C + c, cast(y, y_ptr.dtype.element_ty), mask)


@jit_kernel(do_not_specialize=["N", "eps", "weight_offset"])
def rms_norm_fwd_wide_kernel(
    x_ptr,  # (N, C), rows x_row apart
    residual_ptr,  # (N, C) or None
    x_bias_ptr,  # (C) or None
    weight_ptr,  # (C) or None
    y_ptr,  # (N, C) contiguous
    sum_ptr,  # (N, C) contiguous, or None without residual
    rstd_ptr,  # (N)
    x_row, residual_row, N, C, eps, weight_offset, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalise one row per program in blocks of BLOCK columns, in two passes: mean of squares, output."""
    row = tl.program_id(0).to(tl.int64)
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        h = load_sum(x_ptr, residual_ptr, x_bias_ptr, sum_ptr, row, x_row, residual_row, C, c, c < C)
        acc += h * h
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(acc, axis=0) / C + eps))
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        # add again instead of reading the sum, which another thread of this program may have written
        h = load_sum(x_ptr, residual_ptr, x_bias_ptr, None, row, x_row, residual_row, C, c, c < C)
        y = _weighted(h * rstd, weight_ptr, weight_offset, c, c < C)
        tl.store(y_ptr + row * C + c, cast(y, y_ptr.dtype.element_ty), c < C)


@triton.jit
def _dx_terms(sum_gn, rstd, C, eps):
    """Return mean and factor of dx = factor * (g - n * mean).

    With one column the difference is g * (1 - n^2) = g * eps * rstd^2, which cancellation would destroy; the factor
    contains this product instead.
    """
    return tl.where(C == 1, 0.0, sum_gn / C), tl.where(C == 1, eps * rstd * rstd * rstd, rstd)


@triton.jit
def _load_grads(dy_ptr, h_ptr, row, dy_row, h_row, c, mask, rstd):
    """Load one tile; return dy and n in fp32, zero where masked."""
    dy = tl.load(dy_ptr + row * dy_row + c, mask, other=0.0).to(tl.float32)
    return dy, tl.load(h_ptr + row * h_row + c, mask, other=0.0).to(tl.float32) * rstd


@jit_kernel(do_not_specialize=["N", "eps", "weight_offset"])
def rms_norm_bwd_kernel(
    dy_ptr,  # (N, C), rows dy_row apart
    dsum_ptr,  # (N, C), rows dsum_row apart, or None
    h_ptr,  # (N, C), rows h_row apart
    weight_ptr,  # (C) or None
    rstd_ptr,  # (N)
    dx_ptr,  # (N, C) contiguous
    partials_ptr,  # (programs, 1, C): dweight; with X_BIAS (programs, 2, C): dx_bias, too; or None
    dy_row, dsum_row, h_row, N, C, eps, weight_offset, X_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program p computes row tiles p, p + programs, ... and keeps its partial sums in registers."""
    c = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    in_row = c < C
    dweight = tl.zeros([1, BLOCK], tl.float32)
    dx_bias = tl.zeros([1, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)  # (ROWS, 1)
        mask = (row < N) & in_row
        rstd = tl.load(rstd_ptr + row, row < N, other=0.0)
        dy, n = _load_grads(dy_ptr, h_ptr, row, dy_row, h_row, c, mask, rstd)
        dyn = dy * n
        if partials_ptr is not None:
            dweight += tl.sum(dyn, axis=0, keep_dims=True)
        gn = _weighted(dyn, weight_ptr, weight_offset, c, in_row)  # computing it as g * n spills 8 bytes on sm_80
        mean_gn, factor = _dx_terms(tl.sum(gn, axis=1, keep_dims=True), rstd, C, eps)
        g = _weighted(dy, weight_ptr, weight_offset, c, in_row)
        dx = factor * (g - n * mean_gn)
        dx = store_dx(dx, dx_ptr, dsum_ptr, row, dsum_row, C, c, mask)
        if X_BIAS:
            dx_bias += tl.sum(dx, axis=0, keep_dims=True)
    if partials_ptr is not None:
        out = partials_ptr + tl.program_id(0).to(tl.int64) * (2 if X_BIAS else 1) * C + c
        tl.store(out, dweight, in_row)
        if X_BIAS:
            tl.store(out + C, dx_bias, in_row)


@jit_kernel(do_not_specialize=["N", "eps", "weight_offset"])
def rms_norm_dx_wide_kernel(
    dy_ptr,  # (N, C), rows dy_row apart
    dsum_ptr,  # (N, C), rows dsum_row apart, or None
    h_ptr,  # (N, C), rows h_row apart
    weight_ptr,  # (C) or None
    rstd_ptr,  # (N)
    dx_ptr,  # (N, C) contiguous
    dy_row, dsum_row, h_row, N, C, eps, weight_offset, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute dx of one row per program in blocks of BLOCK columns, in two passes: the sum, dx."""
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_ptr + row)
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        dy, n = _load_grads(dy_ptr, h_ptr, row, dy_row, h_row, c, c < C, rstd)
        acc += _weighted(dy, weight_ptr, weight_offset, c, c < C) * n
    mean_gn, factor = _dx_terms(tl.sum(acc, axis=0), rstd, C, eps)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        dy, n = _load_grads(dy_ptr, h_ptr, row, dy_row, h_row, c, c < C, rstd)
        dx = factor * (_weighted(dy, weight_ptr, weight_offset, c, c < C) - n * mean_gn)
        store_dx(dx, dx_ptr, dsum_ptr, row, dsum_row, C, c, c < C)


RMS_NORM = _norm.Norm(
    fwd=rms_norm_fwd_kernel,
    fwd_wide=rms_norm_fwd_wide_kernel,
    bwd=rms_norm_bwd_kernel,
    dx_wide=rms_norm_dx_wide_kernel,
    mean=False,
    fwd_elements=2048,  # 4096, as LayerNorm has, spill in fp32
    wide_warps=16,  # 8 columns a thread: 16 spill without 16-byte alignment
)


def rms_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return y, x + x_bias + residual (None without a residual) and rstd (N)."""
    rstd = torch.empty((math.prod(x.shape[:-1]),), dtype=torch.float32, device=x.device)
    y, total = _norm.forward(RMS_NORM, x, residual, x_bias, (weight,), rstd, eps, weight_offset)
    return y, total, rstd


def rms_norm_bwd(
    dy: Tensor,
    dsum: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    eps: float,
    weight_offset: float,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return dx, which is also the gradient of the residual, dweight and dx_bias (None if the parameter is None)."""
    dx, dweight, _, dx_bias = _norm.backward(RMS_NORM, dy, dsum, h, weight, None, rstd, x_bias, eps, weight_offset)
    return dx, dweight, dx_bias


def configurations(dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Iterator[Configuration]:
    """Yield every launch shape of RMSNorm."""
    return _norm.configurations(RMS_NORM, dtype, weight_dtype)
