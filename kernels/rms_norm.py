"""RMSNorm with residual add, forward and backward (Zhang, Sennrich 2019, arXiv:1910.07467).

    h = x + residual (rounded to x's dtype),  rstd = 1 / sqrt(sum(h^2) / C + eps),  n = h * rstd
    y = n * w,  w = weight + weight_offset in fp32
    g = dy * w,  dx = rstd * (g - n * sum(g * n) / C) + dsum,  dweight = sum_N(dy * n)

Fused: add, norm and weight in one pass; dx and dweight in one pass and a small reduce.
Bytes an element: forward reads x (and residual), writes y (and sum); backward reads dy, h (and dsum), writes dx.
Saved for backward: h in x's dtype, rstd in fp32.
Rows, column blocks, partials of dweight and their reduce are those of kernels/layer_norm.py: no atomics, bitwise
deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._runtime import (
    Configuration,
    as_rows,
    cast,
    interpreted,
    jit_kernel,
    on_device,
    pointers,
    powers_of_two,
    processors,
    quick_width,
    split_meta,
)
from .layer_norm import (
    BWD_ONE_PIECE,
    FWD_ONE_PIECE,
    MAX_COLUMNS,
    _load_sum,
    _rows_meta,
    layer_norm_reduce_kernel,
    partials_meta,
    reduce_meta,
)


@triton.jit
def _weighted(n, weight_ptr, weight_offset, c, mask):
    """n * (weight + offset) in fp32; n without weight."""
    if weight_ptr is not None:
        n *= tl.load(weight_ptr + c, mask, other=0.0).to(tl.float32) + weight_offset
    return n


@jit_kernel(do_not_specialize=["N", "eps", "weight_offset"])
def rms_norm_fwd_kernel(
    x_ptr,  # (N, C), rows x_row apart
    residual_ptr,  # (N, C) or None
    weight_ptr,  # (C) or None
    y_ptr,  # (N, C) contiguous
    sum_ptr,  # (N, C) contiguous, or None without residual
    rstd_ptr,  # (N)
    x_row, residual_row, N, C, eps, weight_offset, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program, each in one piece of BLOCK >= C columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    c = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    in_row = c < C
    mask = (row < N) & in_row
    h = _load_sum(x_ptr, residual_ptr, row, x_row, residual_row, c, mask)
    if residual_ptr is not None:
        tl.store(sum_ptr + row * C + c, cast(h, sum_ptr.dtype.element_ty), mask)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(h * h, axis=1, keep_dims=True) / C + eps))  # (ROWS, 1)
    tl.store(rstd_ptr + row, rstd, row < N)
    y = _weighted(h * rstd, weight_ptr, weight_offset, c, in_row)
    tl.store(y_ptr + row * C + c, cast(y, y_ptr.dtype.element_ty), mask)


@jit_kernel(do_not_specialize=["N", "eps", "weight_offset"])
def rms_norm_fwd_wide_kernel(
    x_ptr,  # (N, C), rows x_row apart
    residual_ptr,  # (N, C) or None
    weight_ptr,  # (C) or None
    y_ptr,  # (N, C) contiguous
    sum_ptr,  # (N, C) contiguous, or None without residual
    rstd_ptr,  # (N)
    x_row, residual_row, N, C, eps, weight_offset, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program, in blocks of BLOCK columns, twice over: mean of squares, output."""
    row = tl.program_id(0).to(tl.int64)
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        h = _load_sum(x_ptr, residual_ptr, row, x_row, residual_row, c, c < C)
        if residual_ptr is not None:
            tl.store(sum_ptr + row * C + c, cast(h, sum_ptr.dtype.element_ty), c < C)
        acc += h * h
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(acc, axis=0) / C + eps))
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        # added again, not read from sum: another thread of this program may have written it
        h = _load_sum(x_ptr, residual_ptr, row, x_row, residual_row, c, c < C)
        y = _weighted(h * rstd, weight_ptr, weight_offset, c, c < C)
        tl.store(y_ptr + row * C + c, cast(y, y_ptr.dtype.element_ty), c < C)


@triton.jit
def _dx_terms(sum_gn, rstd, C, eps):
    """mean and factor of dx = factor * (g - n * mean). With one column the difference, g * (1 - n^2), is
    g * eps * rstd^2, and would be lost to cancellation: the product is in the factor."""
    return tl.where(C == 1, 0.0, sum_gn / C), tl.where(C == 1, eps * rstd * rstd * rstd, rstd)


@triton.jit
def _load_grads(dy_ptr, h_ptr, row, dy_row, h_row, c, mask, rstd):
    """One tile of dy and n in fp32, zero where masked."""
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
    partials_ptr,  # (programs, 1, C): dweight; or None
    dy_row, dsum_row, h_row, N, C, eps, weight_offset, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Persistent: program p takes row tiles p, p + programs, ... with its share of dweight in registers."""
    c = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    in_row = c < C
    dweight = tl.zeros([1, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)  # (ROWS, 1)
        mask = (row < N) & in_row
        rstd = tl.load(rstd_ptr + row, row < N, other=0.0)
        dy, n = _load_grads(dy_ptr, h_ptr, row, dy_row, h_row, c, mask, rstd)
        dyn = dy * n
        if partials_ptr is not None:
            dweight += tl.sum(dyn, axis=0, keep_dims=True)
        gn = _weighted(dyn, weight_ptr, weight_offset, c, in_row)  # g * n spills 8 bytes on sm_80
        mean_gn, factor = _dx_terms(tl.sum(gn, axis=1, keep_dims=True), rstd, C, eps)
        g = _weighted(dy, weight_ptr, weight_offset, c, in_row)
        dx = factor * (g - n * mean_gn)
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + row * dsum_row + c, mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * C + c, cast(dx, dx_ptr.dtype.element_ty), mask)
    if partials_ptr is not None:
        tl.store(partials_ptr + tl.program_id(0).to(tl.int64) * C + c, dweight, in_row)


@jit_kernel(do_not_specialize=["N", "weight_offset"])
def rms_norm_dx_wide_kernel(
    dy_ptr,  # (N, C), rows dy_row apart
    dsum_ptr,  # (N, C), rows dsum_row apart, or None
    h_ptr,  # (N, C), rows h_row apart
    weight_ptr,  # (C) or None
    rstd_ptr,  # (N)
    dx_ptr,  # (N, C) contiguous
    dy_row, dsum_row, h_row, N, C, weight_offset, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program, in blocks of BLOCK columns, twice over: the sum, then dx."""
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_ptr + row)
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        dy, n = _load_grads(dy_ptr, h_ptr, row, dy_row, h_row, c, c < C, rstd)
        acc += _weighted(dy, weight_ptr, weight_offset, c, c < C) * n
    mean_gn = tl.sum(acc, axis=0) / C
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        dy, n = _load_grads(dy_ptr, h_ptr, row, dy_row, h_row, c, c < C, rstd)
        dx = rstd * (_weighted(dy, weight_ptr, weight_offset, c, c < C) - n * mean_gn)
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + row * dsum_row + c, c < C, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * C + c, cast(dx, dx_ptr.dtype.element_ty), c < C)


@jit_kernel(do_not_specialize=["N"])
def rms_norm_partials_wide_kernel(
    dy_ptr,  # (N, C), rows dy_row apart
    h_ptr,  # (N, C), rows h_row apart
    rstd_ptr,  # (N)
    partials_ptr,  # (programs along axis 1, 1, C): dweight
    dy_row, h_row, N, C, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dweight of BLOCK columns over row tiles p, p + programs, ...; p along axis 1."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(N, ROWS), tl.num_programs(1)):
        row = (tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)  # (ROWS, 1)
        rstd = tl.load(rstd_ptr + row, row < N, other=0.0)
        dy, n = _load_grads(dy_ptr, h_ptr, row, dy_row, h_row, c, (row < N) & (c < C), rstd)
        dweight += dy * n
    out = partials_ptr + tl.program_id(1).to(tl.int64) * C + c
    tl.store(out, tl.sum(dweight, axis=0, keep_dims=True), c < C)


def _meta(C: int, one_piece: int, rows: int, elements: int, warps: int) -> dict[str, int]:
    """LayerNorm's launch shape, with 8 columns a thread in the wide kernels: 16 spill without 16-byte alignment."""
    meta = _rows_meta(C, one_piece, rows, elements, warps)
    return meta if "ROWS" in meta else {**meta, "num_warps": 16}


def fwd_meta(C: int) -> dict[str, int]:
    """Launch shape of the forward kernel; without ROWS: the wide one."""
    return _meta(C, FWD_ONE_PIECE, rows=16, elements=2048, warps=8)  # 4096 elements, as LayerNorm has, spill in fp32


def bwd_meta(C: int) -> dict[str, int]:
    """Launch shape of the backward kernel; without ROWS: the wide ones."""
    return _meta(C, BWD_ONE_PIECE, rows=4, elements=1024, warps=16)


def rms_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, x + residual (None without) and rstd (N)."""
    h = as_rows(x)  # (N, C)
    r = None if residual is None else as_rows(residual)
    weight = None if weight is None else weight.contiguous()
    N, C = h.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if r is None else torch.empty_like(y)
    rstd = torch.empty((N,), dtype=torch.float32, device=x.device)
    if y.numel() == 0:
        return y, total, rstd
    meta = fwd_meta(C)
    kernel = rms_norm_fwd_kernel if "ROWS" in meta else rms_norm_fwd_wide_kernel
    r_row = 0 if r is None else r.stride(0)
    with on_device(x):
        grid = (triton.cdiv(N, meta.get("ROWS", 1)),)
        kernel[grid](h, r, weight, y, total, rstd, h.stride(0), r_row, N, C, eps, weight_offset, **meta)
    return y, total, rstd


def rms_norm_bwd(
    dy: Tensor,
    dsum: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor | None]:
    """dx (the residual's gradient too) and dweight (None without weight)."""
    weight = None if weight is None else weight.contiguous()
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if dx.numel() == 0:
        return dx, None if weight is None else torch.zeros_like(weight)
    dweight = None if weight is None else torch.empty_like(weight)
    dy2, h2 = as_rows(dy), as_rows(h)  # (N, C)
    dsum2 = None if dsum is None else as_rows(dsum)
    with on_device(h):
        partials = _launch_bwd(dy2, dsum2, h2, weight, rstd, dx, eps, weight_offset)
        if partials is not None:
            meta = reduce_meta()
            P, _, C = partials.shape
            layer_norm_reduce_kernel[(triton.cdiv(C, meta["BLOCK"]), 1)](partials, dweight, None, P, C, **meta)
    return dx, dweight


def _launch_bwd(
    dy: Tensor,
    dsum: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dx: Tensor,
    eps: float,
    weight_offset: float,
) -> Tensor | None:
    """Fill dx; return each program's dweight (programs, 1, C), or None without weight."""
    N, C = h.shape
    meta = bwd_meta(C)
    rows = {"dy_row": dy.stride(0), "h_row": h.stride(0), "N": N, "C": C}
    dx_rows = {**rows, "dsum_row": 0 if dsum is None else dsum.stride(0), "weight_offset": weight_offset}
    if "ROWS" in meta:
        per_processor = 2 if interpreted() else max(1, min(16, 8192 // (meta["ROWS"] * meta["BLOCK"])))
        programs = min(triton.cdiv(N, meta["ROWS"]), per_processor * processors(h.device))
        partials = None if weight is None else h.new_empty((programs, 1, C), dtype=torch.float32)
        rms_norm_bwd_kernel[(programs,)](dy, dsum, h, weight, rstd, dx, partials, eps=eps, **dx_rows, **meta)
        return partials
    rms_norm_dx_wide_kernel[(N,)](dy, dsum, h, weight, rstd, dx, **dx_rows, **meta)
    if weight is None:
        return None
    wide = partials_meta()
    blocks = triton.cdiv(C, wide["BLOCK"])
    programs = min(triton.cdiv(N, wide["ROWS"]), max(1, 8 * processors(h.device) // blocks))
    partials = h.new_empty((programs, 1, C), dtype=torch.float32)
    rms_norm_partials_wide_kernel[(blocks, programs)](dy, h, rstd, partials, **rows, **wide)
    return partials


def configurations(dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Iterator[Configuration]:
    """Every launch shape of this file with all options on (the largest register count), and without options."""
    w = weight_dtype or dtype
    f32 = torch.float32
    fwd = {"x_row": "i32", "residual_row": "i32", "N": "i32", "C": "i32", "eps": "fp32", "weight_offset": "fp32"}
    rows = {"dy_row": "i32", "h_row": "i32", "N": "i32", "C": "i32"}
    bwd = {**rows, "dsum_row": "i32", "weight_offset": "fp32"}
    for full in (True, False):
        o, ow = (dtype, w) if full else (None, None)
        case = "full" if full else "plain"
        for block in powers_of_two(16, MAX_COLUMNS):
            quick = quick_width(block)
            if block > BWD_ONE_PIECE and not full:
                continue
            meta, warps = split_meta(fwd_meta(block))
            kernel = rms_norm_fwd_kernel if "ROWS" in meta else rms_norm_fwd_wide_kernel
            types = pointers(x_ptr=dtype, residual_ptr=o, weight_ptr=ow, y_ptr=dtype, sum_ptr=o, rstd_ptr=f32)
            yield Configuration(kernel, f"C={block} {case}", {**types, **fwd}, warps, meta, quick=quick)
            meta, warps = split_meta(bwd_meta(block))
            kernel = rms_norm_bwd_kernel if "ROWS" in meta else rms_norm_dx_wide_kernel
            types = pointers(dy_ptr=dtype, dsum_ptr=o, h_ptr=dtype, weight_ptr=ow, rstd_ptr=f32, dx_ptr=dtype)
            if "ROWS" in meta:
                types |= {**pointers(partials_ptr=f32 if full else None), "eps": "fp32"}
            yield Configuration(kernel, f"C={block} {case}", {**types, **bwd}, warps, meta, quick=quick)
    meta, warps = split_meta(partials_meta())
    types = pointers(dy_ptr=dtype, h_ptr=dtype, rstd_ptr=f32, partials_ptr=f32)
    yield Configuration(rms_norm_partials_wide_kernel, "C=16384", {**types, **rows}, warps, meta)
    meta, warps = split_meta(reduce_meta())
    types = pointers(partials_ptr=f32, dweight_ptr=w, dbias_ptr=None)
    yield Configuration(layer_norm_reduce_kernel, "any C, rms_norm", {**types, "P": "i32", "C": "i32"}, warps, meta)
