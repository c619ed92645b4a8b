"""Gradient of the input of a packed projection from separate gradients of queries, keys and values.

    dx = dq W_q + dk W_k + dv W_v (M, N)

dq (M, Q), dk and dv (M, (K - Q) / 2), W = (W_q; W_k; W_v) (K, N) with N columns of x.

Fused: one product over three factors, so nothing concatenates them. It is summed in fp32 and rounded once.
Bytes: reads dq, dk, dv and W, writes dx; tiles of these are read again from L2 (_product.py).
Sums for the bias are not in it: with the tile that keeps up with the library nothing would hide them
(docs/step-budget.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_tiles import CHIPS
from ._product import SMALL, grid, launch_shape, near_rows, place, tile
from ._runtime import Configuration, cast, dot, jit_kernel, on_device, pointers

# On sm_90 a tile of 256 columns fills a multiprocessor; its epilogue is short beside a depth of three widths, and it
# reads a quarter less from L2.
WHOLE = {227: (128, 256, 64, 8, 3), 163: (128, 128, 32, 8, 4), 99: (128, 128, 32, 8, 3)}


@triton.jit
def _factor(block, dq_ptr, dk_ptr, dv_ptr, dq_row, dk_row, dv_row, Q, G, BLOCK_K: tl.constexpr):
    """Return where a block of columns of (dq | dk | dv) is: the factor's pointer and row step, the block's first column
    in it and in W's rows, and the factor's number of columns. Q: columns of dq, G: of dk."""
    q_blocks, g_blocks = tl.cdiv(Q, BLOCK_K), tl.cdiv(G, BLOCK_K)
    in_q, in_k = block < q_blocks, block < q_blocks + g_blocks
    ptr = tl.where(in_q, dq_ptr, tl.where(in_k, dk_ptr, dv_ptr))
    row = tl.where(in_q, dq_row, tl.where(in_k, dk_row, dv_row))
    before = tl.where(in_q, 0, tl.where(in_k, q_blocks, q_blocks + g_blocks))
    first = (block - before) * BLOCK_K
    start = first + tl.where(in_q, 0, tl.where(in_k, Q, Q + G))
    return ptr, row, first, start, tl.where(in_q, Q, G)


@jit_kernel(do_not_specialize=["M"])
def linear_qkv_bwd_kernel(
    dq_ptr,  # (M, Q), rows dq_row apart
    dk_ptr,  # (M, (K - Q) / 2), rows dk_row apart
    dv_ptr,  # as dk
    weight_ptr,  # (K, N) contiguous
    dx_ptr,  # (M, N) contiguous
    dq_row, dk_row, dv_row, M, N, K, Q, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute one tile of dx per program."""
    m, n = place(M, N, BLOCK_M, BLOCK_N, GROUP)
    G = (K - Q) // 2
    blocks = tl.cdiv(Q, BLOCK_K) + 2 * tl.cdiv(G, BLOCK_K)
    i = tl.arange(0, BLOCK_M)[:, None]
    j = tl.arange(0, BLOCK_N)[None, :]
    k = tl.arange(0, BLOCK_K)
    row = (m * BLOCK_M).to(tl.int64)
    in_m, in_n = i < M - m * BLOCK_M, j < N - n * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(0, blocks):
        ptr, step, first, start, size = _factor(block, dq_ptr, dk_ptr, dv_ptr, dq_row, dk_row, dv_row, Q, G, BLOCK_K)
        a_mask, b_mask = in_m, in_n
        if not WHOLE:
            a_mask, b_mask = in_m & (k[None, :] < size - first), in_n & (k[:, None] < size - first)
        a = tl.load(ptr + row * step + first + (i * step + k[None, :]), a_mask, other=0.0)
        b = tl.load(weight_ptr + start.to(tl.int64) * N + n * BLOCK_N + (k[:, None] * N + j), b_mask, other=0.0)
        acc += dot(a, b)
    dx_at = dx_ptr + row * N + n * BLOCK_N + (i.to(tl.int64) * N + j)
    tl.store(dx_at, cast(acc, dx_ptr.dtype.element_ty), in_m & in_n)


def linear_qkv_bwd(dq: Tensor, dk: Tensor, dv: Tensor, weight: Tensor) -> Tensor:
    """Return dx (N, C) for dq (N, Q), dk and dv (N, G) and weight (Q + 2 G, C)."""
    factors = (near_rows(dq), near_rows(dk), near_rows(dv))
    weight, (M, Q), (K, N) = weight.contiguous(), dq.shape, weight.shape
    dx = dq.new_empty((M, N))
    if K == 0 or dx.numel() == 0:
        return dx.zero_()
    steps = tuple(t.stride(0) for t in factors)
    shape = launch_shape(WHOLE, tuple(t.shape[1] for t in factors), steps, *factors, weight, dx)
    with on_device(dx):
        linear_qkv_bwd_kernel[grid(M, N, shape)](*factors, weight, dx, *steps, M, N, K, Q, **shape)
    return dx


def configurations(dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Iterator[Configuration]:
    """Yield every launch shape of this file."""
    shapes: list[tuple[tuple[int, ...], int | None]] = [(SMALL, None)]
    if dtype != torch.float32:
        shapes += [(WHOLE[kb], kb) for kb in CHIPS]
    sizes = {name: "i32" for name in ("dq_row", "dk_row", "dv_row", "M", "N", "K", "Q")}
    types = pointers(dq_ptr=dtype, dk_ptr=dtype, dv_ptr=dtype, weight_ptr=dtype, dx_ptr=dtype)
    for shape, kb in shapes:
        launch = tile(shape)
        options: dict[str, Any] = dict(num_warps=launch.pop("num_warps"), num_stages=launch.pop("num_stages"))
        options |= dict(archs=None if kb is None else CHIPS[kb], aligned=kb is not None)
        flags = {**launch, "WHOLE": kb is not None}
        case = "any" if kb is None else "whole"
        yield Configuration(linear_qkv_bwd_kernel, case, {**types, **sizes}, constexprs=flags, **options)
