"""bias + GELU, forward and backward (Hendrycks, Gimpel 2016, arXiv:1606.08415).

    u = x + bias,  y = gelu(u),  dx = dy gelu'(u),  dbias = sum_N(dx);  gelu by erf or tanh, formulas in _math.py

Fused: add and activation in one pass; dx and dbias in one pass and a small reduce.
Bytes an element: forward reads x, writes y; backward reads dy and x, writes dx.
Saved for backward: x and bias.
dbias is a sum of partials (_partials.py), so results are bitwise deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._math import gelu, gelu_tanh
from ._partials import add_partials, add_partials_configuration
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

MAX_BLOCK = 1024  # columns per program; wider rows are divided
PROGRAMS = 8  # of 128 threads that fit on a multiprocessor in backward: up to 64 registers each


@triton.jit
def _load(x_ptr, bias_ptr, row, x_row, c, mask, in_row):
    """Load one tile; return x + bias in fp32."""
    u = tl.load(x_ptr + row * x_row + c, mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        u += tl.load(bias_ptr + c, in_row, other=0.0).to(tl.float32)
    return u


@jit_kernel(do_not_specialize=["N"])
def bias_gelu_fwd_kernel(
    x_ptr,  # (N, C), rows x_row apart
    bias_ptr,  # (C) or None
    y_ptr,  # (N, C) contiguous
    x_row, N, C, TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute one tile of (ROWS, BLOCK) per program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    mask = (row < N) & (c < C)
    u = _load(x_ptr, bias_ptr, row, x_row, c, mask, c < C)
    if TANH:
        y, _ = gelu_tanh(u)
    else:
        y, _ = gelu(u)
    tl.store(y_ptr + row * C + c, cast(y, y_ptr.dtype.element_ty), mask)


@jit_kernel(do_not_specialize=["N"])
def bias_gelu_bwd_kernel(
    dy_ptr,  # (N, C), rows dy_row apart
    x_ptr,  # (N, C), rows x_row apart
    bias_ptr,  # (C) or None
    dx_ptr,  # (N, C) contiguous
    partials_ptr,  # (programs along axis 0, 1, C): dbias; or None
    dy_row, x_row, N, C, TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program p computes BLOCK columns of row tiles p, p + programs, ... and keeps its partial dbias in registers."""
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)  # (ROWS, 1)
        mask = (row < N) & (c < C)
        u = _load(x_ptr, bias_ptr, row, x_row, c, mask, c < C)
        if TANH:
            _, slope = gelu_tanh(u)
        else:
            _, slope = gelu(u)
        d = tl.load(dy_ptr + row * dy_row + c, mask, other=0.0).to(tl.float32) * slope
        tl.store(dx_ptr + row * C + c, cast(d, dx_ptr.dtype.element_ty), mask)
        dbias += tl.where(mask, d, 0.0)  # the slope at a masked bias may be NaN
    if partials_ptr is not None:
        out = partials_ptr + tl.program_id(0).to(tl.int64) * C + c
        tl.store(out, tl.sum(dbias, axis=0, keep_dims=True), c < C)


def tile_meta(C: int, elements: int) -> dict[str, int]:
    """Return a tile of up to `elements` elements, 8 per thread (interpreter: larger)."""
    if interpreted():
        return {"ROWS": 64, "BLOCK": min(ceil_pow2(C), 8192), "num_warps": 4}
    block = min(ceil_pow2(C), MAX_BLOCK)
    return {"ROWS": max(1, elements // block), "BLOCK": block, "num_warps": 4}


def fwd_meta(C: int) -> dict[str, int]:
    """Return the launch shape of the forward kernel."""
    return tile_meta(C, 2048)


def bwd_meta(C: int) -> dict[str, int]:
    """Return the launch shape of the backward kernel."""
    return tile_meta(C, 1024)


def bias_gelu_fwd(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """Return y, contiguous."""
    rows = as_rows(x)  # (N, C)
    bias = None if bias is None else bias.contiguous()
    N, C = rows.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    meta = fwd_meta(C)
    with on_device(x):
        grid = (triton.cdiv(N, meta["ROWS"]), triton.cdiv(C, meta["BLOCK"]))
        bias_gelu_fwd_kernel[grid](rows, bias, y, rows.stride(0), N, C, TANH=tanh, **meta)
    return y


def bias_gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor | None]:
    """Return dx and dbias (None without bias)."""
    bias = None if bias is None else bias.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel() == 0:
        return dx, None if bias is None else torch.zeros_like(bias)
    dbias = None if bias is None else torch.empty_like(bias)
    dy2, x2 = as_rows(dy), as_rows(x)  # (N, C)
    N, C = x2.shape
    meta = bwd_meta(C)
    blocks = triton.cdiv(C, meta["BLOCK"])
    most = 2 if interpreted() else max(1, PROGRAMS * processors(x.device) // blocks)
    programs = min(triton.cdiv(N, meta["ROWS"]), most)
    partials = None if bias is None else x.new_empty((programs, 1, C), dtype=torch.float32)
    with on_device(x):
        strides = (dy2.stride(0), x2.stride(0))
        bias_gelu_bwd_kernel[(programs, blocks)](dy2, x2, bias, dx, partials, *strides, N, C, TANH=tanh, **meta)
        if partials is not None:
            add_partials(partials, dbias)
    return dx, dbias


def configurations(dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Iterator[Configuration]:
    """Yield every launch shape of this file, with and without bias, by erf and by tanh."""
    f32 = torch.float32
    sizes = {"x_row": "i32", "N": "i32", "C": "i32"}
    for tanh in (False, True):
        for full in (True, False):
            w, partial = ((weight_dtype or dtype), f32) if full else (None, None)
            case = f"{'tanh' if tanh else 'erf'} {'full' if full else 'plain'}"
            for block in powers_of_two(16, MAX_BLOCK):
                meta, warps = split_meta(fwd_meta(block))
                types: dict[str, Any] = {**pointers(x_ptr=dtype, bias_ptr=w, y_ptr=dtype), **sizes, "TANH": tanh}
                quick = full == tanh and quick_width(block)
                yield Configuration(bias_gelu_fwd_kernel, f"C={block} {case}", types, warps, meta, quick=quick)
                meta, warps = split_meta(bwd_meta(block))
                grads = pointers(dy_ptr=dtype, x_ptr=dtype, bias_ptr=w, dx_ptr=dtype, partials_ptr=partial)
                types = {**grads, **sizes, "dy_row": "i32", "TANH": tanh}
                yield Configuration(
                    bias_gelu_bwd_kernel, f"C={block} {case}", types, warps, meta, programs=PROGRAMS, quick=quick
                )
    yield add_partials_configuration("dbias", weight_dtype or dtype)
