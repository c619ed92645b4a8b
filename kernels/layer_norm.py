"""LayerNorm with residual add, forward and backward (Ba, Kiros, Hinton 2016, arXiv:1607.06450).

    h = x + residual (rounded to x's dtype),  mean = sum(h) / C,  var = sum((h - mean)^2) / C
    rstd = 1 / sqrt(var + eps),  n = (h - mean) * rstd,  y = n * weight + bias
    g = dy * weight,  dx = rstd * (g - sum(g) / C - n * sum(g * n) / C) + dsum
    dweight = sum_N(dy * n),  dbias = sum_N(dy)

Fused: add, norm and affine in one pass; dx and the parameter gradients in one pass and a small reduce.
Bytes an element: forward reads x (and residual), writes y (and sum); backward reads dy, h (and dsum), writes dx.
Saved for backward: h in x's dtype, mean and rstd in fp32.
A row stays in registers while it fits (forward C <= 16384, backward C <= 8192); above, column blocks are read again,
from L2. dweight and dbias: every program sums its rows in fp32 and writes one row of partials; a second kernel adds
these in a fixed order. No atomics, so bitwise deterministic. That kernel and not torch.sum: it sums both and rounds to
the weight's dtype in one launch instead of four.
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
    ceil_pow2,
    interpreted,
    jit_kernel,
    on_device,
    pointers,
    powers_of_two,
    processors,
    quick_width,
    split_meta,
)

MAX_COLUMNS = 65536
FWD_ONE_PIECE = 16384  # wider rows spill where pointers or strides are not 16-byte aligned (112 to 320 bytes at 32768)
BWD_ONE_PIECE = 8192  # wider rows spill (256 bytes at 16384)


@triton.jit
def _load_sum(x_ptr, residual_ptr, row, x_row, residual_row, c, mask):
    """h of one tile in fp32: x, or x + residual rounded to x's dtype."""
    h = tl.load(x_ptr + row * x_row + c, mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        h += tl.load(residual_ptr + row * residual_row + c, mask, other=0.0).to(tl.float32)
        h = cast(h, x_ptr.dtype.element_ty).to(tl.float32)
    return h


@triton.jit
def _affine(n, weight_ptr, bias_ptr, c, mask):
    """n * weight + bias in fp32, either of them optional."""
    if weight_ptr is not None:
        n *= tl.load(weight_ptr + c, mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        n += tl.load(bias_ptr + c, mask, other=0.0).to(tl.float32)
    return n


@jit_kernel(do_not_specialize=["N", "eps"])
def layer_norm_fwd_kernel(
    x_ptr,  # (N, C), rows x_row apart
    residual_ptr,  # (N, C) or None
    weight_ptr,  # (C) or None
    bias_ptr,  # (C) or None
    y_ptr,  # (N, C) contiguous
    sum_ptr,  # (N, C) contiguous, or None without residual
    stats_ptr,  # (2, N): mean, rstd
    x_row, residual_row, N, C, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program, each in one piece of BLOCK >= C columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    c = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    in_row = c < C
    mask = (row < N) & in_row
    h = _load_sum(x_ptr, residual_ptr, row, x_row, residual_row, c, mask)
    if residual_ptr is not None:
        tl.store(sum_ptr + row * C + c, cast(h, sum_ptr.dtype.element_ty), mask)
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
    weight_ptr,  # (C) or None
    bias_ptr,  # (C) or None
    y_ptr,  # (N, C) contiguous
    sum_ptr,  # (N, C) contiguous, or None without residual
    stats_ptr,  # (2, N): mean, rstd
    x_row, residual_row, N, C, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program, in blocks of BLOCK columns, three times over: mean, variance, output."""
    row = tl.program_id(0).to(tl.int64)
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        h = _load_sum(x_ptr, residual_ptr, row, x_row, residual_row, c, c < C)
        if residual_ptr is not None:
            tl.store(sum_ptr + row * C + c, cast(h, sum_ptr.dtype.element_ty), c < C)
        acc += h
    mean = tl.sum(acc, axis=0) / C
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        # added again, not read from sum: another thread of this program may have written it
        d = tl.where(c < C, _load_sum(x_ptr, residual_ptr, row, x_row, residual_row, c, c < C) - mean, 0.0)
        acc += d * d
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(acc, axis=0) / C + eps))
    tl.store(stats_ptr + row, mean)
    tl.store(stats_ptr + N + row, rstd)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        d = _load_sum(x_ptr, residual_ptr, row, x_row, residual_row, c, c < C) - mean
        y = _affine(d * rstd, weight_ptr, bias_ptr, c, c < C)
        tl.store(y_ptr + row * C + c, cast(y, y_ptr.dtype.element_ty), c < C)


@triton.jit
def _load_grads(dy_ptr, h_ptr, weight_ptr, row, dy_row, h_row, c, mask, in_row, mean, rstd):
    """One tile of dy, n and g = dy * weight in fp32, zero where masked."""
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
    partials_ptr,  # (programs, 2, C): dweight, dbias; or None
    dy_row, dsum_row, h_row, N, C, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Persistent: program p takes row tiles p, p + programs, ... with its share of dweight and dbias in registers."""
    c = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    in_row = c < C
    dweight = tl.zeros([1, BLOCK], tl.float32)
    dbias = tl.zeros([1, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)  # (ROWS, 1)
        mask = (row < N) & in_row
        mean = tl.load(stats_ptr + row, row < N, other=0.0)
        rstd = tl.load(stats_ptr + N + row, row < N, other=0.0)
        dy, n, g = _load_grads(dy_ptr, h_ptr, weight_ptr, row, dy_row, h_row, c, mask, in_row, mean, rstd)
        if partials_ptr is not None:
            dweight += tl.sum(dy * n, axis=0, keep_dims=True)
            dbias += tl.sum(dy, axis=0, keep_dims=True)
        mean_g = tl.sum(g, axis=1, keep_dims=True) / C
        mean_gn = tl.sum(g * n, axis=1, keep_dims=True) / C
        dx = rstd * (g - mean_g - n * mean_gn)
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + row * dsum_row + c, mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * C + c, cast(dx, dx_ptr.dtype.element_ty), mask)
    if partials_ptr is not None:
        out = partials_ptr + tl.program_id(0).to(tl.int64) * 2 * C + c
        tl.store(out, dweight, in_row)
        tl.store(out + C, dbias, in_row)


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
    """One row a program, in blocks of BLOCK columns, twice over: the two sums, then dx."""
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
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + row * dsum_row + c, c < C, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * C + c, cast(dx, dx_ptr.dtype.element_ty), c < C)


@jit_kernel(do_not_specialize=["N"])
def layer_norm_partials_wide_kernel(
    dy_ptr,  # (N, C), rows dy_row apart
    h_ptr,  # (N, C), rows h_row apart
    stats_ptr,  # (2, N)
    partials_ptr,  # (programs along axis 1, 2, C): dweight, dbias
    dy_row, h_row, N, C, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dweight and dbias of BLOCK columns over row tiles p, p + programs, ...; p along axis 1."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(N, ROWS), tl.num_programs(1)):
        row = (tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)  # (ROWS, 1)
        mask = (row < N) & (c < C)
        mean = tl.load(stats_ptr + row, row < N, other=0.0)
        rstd = tl.load(stats_ptr + N + row, row < N, other=0.0)
        dy, n, g = _load_grads(dy_ptr, h_ptr, None, row, dy_row, h_row, c, mask, c < C, mean, rstd)
        dweight += dy * n
        dbias += dy
    out = partials_ptr + tl.program_id(1).to(tl.int64) * 2 * C + c
    tl.store(out, tl.sum(dweight, axis=0, keep_dims=True), c < C)
    tl.store(out + C, tl.sum(dbias, axis=0, keep_dims=True), c < C)


@jit_kernel(do_not_specialize=["P"])
def layer_norm_reduce_kernel(
    partials_ptr,  # (P, sums, C): dweight, or dweight and dbias
    dweight_ptr,  # (C) or None
    dbias_ptr,  # (C) or None
    P, C, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums BLOCK columns of partials over P in a fixed order; axis 1 of the grid: 0 dweight, 1 dbias."""
    which, sums = tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, P, ROWS):
        p = (start + tl.arange(0, ROWS)[:, None]).to(tl.int64)  # (ROWS, 1)
        acc += tl.load(partials_ptr + (sums * p + which) * C + c, (p < P) & (c < C), other=0.0)
    total = tl.sum(acc, axis=0, keep_dims=True)
    # not `(c < C) & (which == 0)`: the interpreter turns a scalar condition into an integer mask, refused by Triton 3.9
    if which == 0:
        if dweight_ptr is not None:
            tl.store(dweight_ptr + c, cast(total, dweight_ptr.dtype.element_ty), c < C)
    elif dbias_ptr is not None:
        tl.store(dbias_ptr + c, cast(total, dbias_ptr.dtype.element_ty), c < C)


def _rows_meta(C: int, one_piece: int, rows: int, elements: int, warps: int) -> dict[str, int]:
    """Up to `rows` rows and `elements` elements a program (interpreter: more); column blocks above `one_piece`."""
    block = ceil_pow2(C)
    if block > one_piece:
        return {"BLOCK": 4096, "num_warps": 8}
    if interpreted():
        rows, elements = 64, 65536
    rows = max(1, min(rows, elements // block))
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(4, min(warps, 4 * rows * block // elements))}


def fwd_meta(C: int) -> dict[str, int]:
    """Launch shape of the forward kernel; without ROWS: the wide one."""
    return _rows_meta(C, FWD_ONE_PIECE, rows=16, elements=4096, warps=8)


def bwd_meta(C: int) -> dict[str, int]:
    """Launch shape of the backward kernel; without ROWS: the wide ones."""
    return _rows_meta(C, BWD_ONE_PIECE, rows=4, elements=1024, warps=16)


def partials_meta() -> dict[str, int]:
    """Launch shape of the wide parameter gradients."""
    return {"ROWS": 16, "BLOCK": 8192 if interpreted() else 128, "num_warps": 4}


def reduce_meta() -> dict[str, int]:
    """Launch shape of the reduce over programs."""
    return {"ROWS": 8, "BLOCK": 8192, "num_warps": 4} if interpreted() else {"ROWS": 256, "BLOCK": 16, "num_warps": 8}


def layer_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, x + residual (None without) and (mean, rstd) of shape (2, N)."""
    h = as_rows(x)  # (N, C)
    r = None if residual is None else as_rows(residual)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    N, C = h.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if r is None else torch.empty_like(y)
    stats = torch.empty((2, N), dtype=torch.float32, device=x.device)
    if y.numel() == 0:
        return y, total, stats
    meta = fwd_meta(C)
    kernel = layer_norm_fwd_kernel if "ROWS" in meta else layer_norm_fwd_wide_kernel
    r_row = 0 if r is None else r.stride(0)
    with on_device(x):
        grid = (triton.cdiv(N, meta.get("ROWS", 1)),)
        kernel[grid](h, r, weight, bias, y, total, stats, h.stride(0), r_row, N, C, eps, **meta)
    return y, total, stats


def layer_norm_bwd(
    dy: Tensor, dsum: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx (the residual's gradient too), dweight and dbias (None where the parameter is absent)."""
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if dx.numel() == 0:
        dweight, dbias = (None if t is None else torch.zeros_like(t) for t in (weight, bias))
        return dx, dweight, dbias
    dweight, dbias = (None if t is None else torch.empty_like(t) for t in (weight, bias))
    dy2, h2 = as_rows(dy), as_rows(h)  # (N, C)
    dsum2 = None if dsum is None else as_rows(dsum)
    with on_device(h):
        partials = _launch_bwd(dy2, dsum2, h2, weight, stats, dx, weight is not None or bias is not None)
        if partials is not None:
            meta = reduce_meta()
            P, _, C = partials.shape
            layer_norm_reduce_kernel[(triton.cdiv(C, meta["BLOCK"]), 2)](partials, dweight, dbias, P, C, **meta)
    return dx, dweight, dbias


def _launch_bwd(
    dy: Tensor, dsum: Tensor | None, h: Tensor, weight: Tensor | None, stats: Tensor, dx: Tensor, params: bool
) -> Tensor | None:
    """Fill dx; return each program's dweight and dbias (programs, 2, C), or None if there are no parameters."""
    N, C = h.shape
    meta = bwd_meta(C)
    rows = {"dy_row": dy.stride(0), "h_row": h.stride(0), "N": N, "C": C}
    dsum_row = 0 if dsum is None else dsum.stride(0)
    if "ROWS" in meta:
        per_processor = 2 if interpreted() else max(1, min(16, 8192 // (meta["ROWS"] * meta["BLOCK"])))
        programs = min(triton.cdiv(N, meta["ROWS"]), per_processor * processors(h.device))
        partials = h.new_empty((programs, 2, C), dtype=torch.float32) if params else None
        layer_norm_bwd_kernel[(programs,)](dy, dsum, h, weight, stats, dx, partials, dsum_row=dsum_row, **rows, **meta)
        return partials
    layer_norm_dx_wide_kernel[(N,)](dy, dsum, h, weight, stats, dx, dsum_row=dsum_row, **rows, **meta)
    if not params:
        return None
    wide = partials_meta()
    blocks = triton.cdiv(C, wide["BLOCK"])
    programs = min(triton.cdiv(N, wide["ROWS"]), max(1, 8 * processors(h.device) // blocks))
    partials = h.new_empty((programs, 2, C), dtype=torch.float32)
    layer_norm_partials_wide_kernel[(blocks, programs)](dy, h, stats, partials, **rows, **wide)
    return partials


def configurations(dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Iterator[Configuration]:
    """Every launch shape of this file with all options on (the largest register count), and without options."""
    w = weight_dtype or dtype
    f32 = torch.float32
    fwd = {"x_row": "i32", "residual_row": "i32", "N": "i32", "C": "i32", "eps": "fp32"}
    bwd = {"dy_row": "i32", "h_row": "i32", "N": "i32", "C": "i32"}
    for full in (True, False):
        o, ow = (dtype, w) if full else (None, None)
        case = "full" if full else "plain"
        for block in powers_of_two(16, MAX_COLUMNS):
            quick = quick_width(block)
            if block > BWD_ONE_PIECE and not full:
                continue
            meta, warps = split_meta(fwd_meta(block))
            kernel = layer_norm_fwd_kernel if "ROWS" in meta else layer_norm_fwd_wide_kernel
            types = pointers(x_ptr=dtype, residual_ptr=o, weight_ptr=ow, bias_ptr=ow)
            types |= pointers(y_ptr=dtype, sum_ptr=o, stats_ptr=f32)
            yield Configuration(kernel, f"C={block} {case}", {**types, **fwd}, warps, meta, quick=quick)
            meta, warps = split_meta(bwd_meta(block))
            kernel = layer_norm_bwd_kernel if "ROWS" in meta else layer_norm_dx_wide_kernel
            types = pointers(dy_ptr=dtype, dsum_ptr=o, h_ptr=dtype, weight_ptr=ow, stats_ptr=f32, dx_ptr=dtype)
            if "ROWS" in meta:
                types |= pointers(partials_ptr=f32 if full else None)
            yield Configuration(
                kernel, f"C={block} {case}", {**types, **bwd, "dsum_row": "i32"}, warps, meta, quick=quick
            )
    meta, warps = split_meta(partials_meta())
    types = pointers(dy_ptr=dtype, h_ptr=dtype, stats_ptr=f32, partials_ptr=f32)
    yield Configuration(layer_norm_partials_wide_kernel, "C=16384", {**types, **bwd}, warps, meta)
    meta, warps = split_meta(reduce_meta())
    types = pointers(partials_ptr=f32, dweight_ptr=w, dbias_ptr=w)
    yield Configuration(layer_norm_reduce_kernel, "any C", {**types, "P": "i32", "C": "i32"}, warps, meta)
