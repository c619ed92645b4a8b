"""Token embedding plus position rows, and the dense gradient of a table.

    y[n] = weight[ids[n]] + position_weight[positions[n]]
    dweight[v] (+)= sum of dy[n] over ids[n] = v, in fp32, in the order of n

Bytes an element: forward reads both rows, writes y; backward reads dy and writes dweight once, zeros included, or adds
to the rows that have tokens. Tokens are first sorted by id (stable), so one program sums the gradient of a table row.
There are no atomics, so results are bitwise deterministic. An id outside its table gives NaN in forward and adds
nothing in backward.
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
    split_meta,
)

MIN_BLOCK, FWD_BLOCK, BWD_BLOCK = 16, 1024, 256  # columns per program; wider rows are divided


@jit_kernel(do_not_specialize=["N", "V", "P", "period"])
def embedding_fwd_kernel(
    ids_ptr,  # (N) int64 or int32
    positions_ptr,  # (period) int64 or int32; None: token n has position n % period
    weight_ptr,  # (V, C), rows weight_row apart
    position_weight_ptr,  # (P, C), rows position_row apart, or None
    y_ptr,  # (N, C) contiguous
    weight_row, position_row, N, V, P, period, C, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute one tile of (ROWS, BLOCK) per program."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    inside = n < N
    v = tl.load(ids_ptr + n, inside, other=0).to(tl.int64)
    known = inside & (v >= 0) & (v < V)
    y = tl.load(weight_ptr + v * weight_row + c, known & (c < C), other=float("nan")).to(tl.float32)
    if position_weight_ptr is not None:
        p = n % period
        if positions_ptr is not None:
            p = tl.load(positions_ptr + p, inside, other=0).to(tl.int64)
        known = inside & (p >= 0) & (p < P)
        row = tl.load(position_weight_ptr + p * position_row + c, known & (c < C), other=float("nan"))
        y += row.to(tl.float32)
    tl.store(y_ptr + n * C + c, cast(y, y_ptr.dtype.element_ty), inside & (c < C))


@jit_kernel(do_not_specialize=["V"])
def embedding_bwd_kernel(
    dy_ptr,  # (N, C), rows dy_row apart
    order_ptr,  # (N) int64: tokens sorted by id
    starts_ptr,  # (V + 1) int64: where the tokens of each table row start in order
    dweight_ptr,  # (V, C), rows dweight_row apart
    dy_row, dweight_row, V, C, ADD: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum ROWS table rows per program, TOKENS of each at a time. ADD: add to dweight, only where a row has tokens."""
    v = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK)
    begin = tl.load(starts_ptr + v, v < V, other=0)
    end = tl.load(starts_ptr + v + 1, v < V, other=0)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, tl.max(end - begin, axis=0), TOKENS):
        i = begin[:, None] + first + tl.arange(0, TOKENS)[None, :]  # (ROWS, TOKENS)
        mine = i < end[:, None]
        n = tl.load(order_ptr + i, mine, other=0)
        mask = mine[:, :, None] & (c < C)[None, None, :]  # (ROWS, TOKENS, BLOCK)
        g = tl.load(dy_ptr + n[:, :, None] * dy_row + c[None, None, :], mask, other=0.0)
        total += tl.sum(g.to(tl.float32), axis=1)
    at = dweight_ptr + v[:, None] * dweight_row + c[None, :]
    mask = (v < V)[:, None] & (c < C)[None, :]
    if ADD:
        mask &= (begin < end)[:, None]
        total += tl.load(at, mask, other=0.0).to(tl.float32)
    tl.store(at, cast(total, dweight_ptr.dtype.element_ty), mask)


def fwd_meta(C: int) -> dict[str, int]:
    """Return a tile of up to 1024 elements, 8 per thread (interpreter: larger)."""
    if interpreted():
        return {"ROWS": 64, "BLOCK": min(ceil_pow2(C), 8192), "num_warps": 4}
    block = max(MIN_BLOCK, min(ceil_pow2(C), FWD_BLOCK))
    return {"ROWS": max(1, 1024 // block), "BLOCK": block, "num_warps": 4}


def bwd_meta(C: int) -> dict[str, int]:
    """Return one table row per program, 16 tokens at a time, because the row of a frequent token takes longest."""
    if interpreted():
        return {"ROWS": 64, "TOKENS": 4, "BLOCK": min(ceil_pow2(C), 1024), "num_warps": 4}
    return {"ROWS": 1, "TOKENS": 16, "BLOCK": max(MIN_BLOCK, min(ceil_pow2(C), BWD_BLOCK)), "num_warps": 4}


def embedding_fwd(ids: Tensor, weight: Tensor, position_weight: Tensor | None, positions: Tensor | None) -> Tensor:
    """Return y (..., C), contiguous."""
    (V, C), N = weight.shape, ids.numel()
    y = torch.empty((*ids.shape, C), dtype=weight.dtype, device=weight.device)
    if y.numel() == 0:
        return y
    weight, position_row, P, period = as_rows(weight), 0, 0, 1
    if position_weight is None:
        positions = None
    else:
        position_weight = as_rows(position_weight)
        position_row, P, period = position_weight.stride(0), position_weight.shape[0], ids.shape[-1]
    if positions is not None:
        positions, period = positions.contiguous(), positions.numel()
    meta = fwd_meta(C)
    with on_device(weight):
        grid = (triton.cdiv(N, meta["ROWS"]), triton.cdiv(C, meta["BLOCK"]))
        embedding_fwd_kernel[grid](
            ids.contiguous(), positions, weight, position_weight, y, weight.stride(0), position_row, N, V, P, period, C,
            **meta,
        )  # fmt: skip
    return y


def _sum_rows(dweight: Tensor, dy: Tensor, ids: Tensor, add: bool) -> None:
    V, C = dweight.shape
    if dweight.numel() == 0:
        return
    dy, meta = as_rows(dy), bwd_meta(C)
    with on_device(dy):
        found, order = torch.sort(ids.reshape(-1), stable=True)
        starts = torch.searchsorted(found, torch.arange(V + 1, dtype=found.dtype, device=found.device))
        grid = (triton.cdiv(V, meta["ROWS"]), triton.cdiv(C, meta["BLOCK"]))
        embedding_bwd_kernel[grid](
            dy, order, starts, dweight, dy.stride(0), dweight.stride(0), V, C, ADD=add, **meta
        )  # fmt: skip


def embedding_bwd(dy: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """Return dweight (num_rows, C) in the dtype of dy."""
    dweight = torch.empty((num_rows, dy.shape[-1]), dtype=dy.dtype, device=dy.device)
    _sum_rows(dweight, dy, ids, False)
    return dweight


def embedding_bwd_add(dweight: Tensor, dy: Tensor, ids: Tensor) -> None:
    """Add the gradients of the rows to dweight (V, C), which has the dtype of dy or is fp32."""
    if ids.numel():
        _sum_rows(dweight, dy, ids, True)


def configurations(dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Iterator[Configuration]:
    """Yield every launch shape: without and with positions; into a new gradient and added to an existing one."""
    i64 = torch.int64
    for block in powers_of_two(MIN_BLOCK, FWD_BLOCK):
        meta, warps = split_meta(fwd_meta(block))
        sizes = {n: "i32" for n in ("weight_row", "position_row", "N", "V", "P", "period", "C")}
        for full in (False, True):
            types = pointers(ids_ptr=i64, weight_ptr=dtype, y_ptr=dtype)
            types |= pointers(positions_ptr=i64 if full else None, position_weight_ptr=dtype if full else None)
            case = f"C={block} {'positions' if full else 'plain'}"
            yield Configuration(embedding_fwd_kernel, case, {**types, **sizes}, warps, meta)
    for block in powers_of_two(MIN_BLOCK, BWD_BLOCK):
        meta, warps = split_meta(bwd_meta(block))
        sizes = {n: "i32" for n in ("dy_row", "dweight_row", "V", "C")}
        for add in (False, True):
            types = pointers(dy_ptr=dtype, order_ptr=i64, starts_ptr=i64)
            types |= pointers(dweight_ptr=weight_dtype if add else dtype)
            case = f"C={block} {'add' if add else 'new'}"
            yield Configuration(embedding_bwd_kernel, case, {**types, **sizes, "ADD": add}, warps, meta)
