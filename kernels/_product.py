"""Matrix products in Triton whose epilogues do more than store: what the kernels of these have in common.

A program computes one tile of the result. Programs are ordered in groups of GROUP row tiles, which share their columns,
so tiles are read again from L2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_tiles import shared_memory
from ._runtime import as_rows, dot, interpreted

GROUP = 8  # row tiles of a group
MAX_STEP = 2**22  # elements from row to row of a factor: a tile is addressed with 32 bits
# BLOCK_M rows, BLOCK_N columns, BLOCK_K, warps, stages, by shared memory of the chip in KB: for 16 bits with aligned
# rows of whole BLOCK_K. SMALL for all else, as unaligned rows do not fit in registers with the larger tiles, and exact
# fp32 products run outside the tensor cores.
Shapes = Mapping[int, tuple[int, ...]]
SMALL = (64, 64, 16, 8, 2)
# column blocks of a tile in an epilogue, one after another: all at once would need over 128 registers more
PARTS = tl.constexpr(4)


@triton.jit
def place(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Return the row tile and the column tile of this program: GROUP row tiles take the columns in turn."""
    m_tiles, n_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP * n_tiles)
    within = tl.program_id(0) - group * (GROUP * n_tiles)
    rows = tl.minimum(m_tiles - group * GROUP, GROUP)  # of this group; the last may be smaller
    return group * GROUP + within % rows, within // rows


@triton.jit
def product(
    a_ptr, b_ptr, m, n, M, N, K, a_row, b_k, b_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Return tile (m, n) of a b in fp32, a (M, K) with rows a_row apart, b (K, N) with strides b_k and b_n; WHOLE: K is
    a multiple of BLOCK_K. Rows and columns outside are 0."""
    i = tl.arange(0, BLOCK_M)[:, None]
    j = tl.arange(0, BLOCK_N)[None, :]
    k = tl.arange(0, BLOCK_K)
    a_ptr += (m * BLOCK_M).to(tl.int64) * a_row
    b_ptr += (n * BLOCK_N).to(tl.int64) * b_n
    in_m, in_n = i < M - m * BLOCK_M, j < N - n * BLOCK_N
    a_at, b_at = i * a_row + k[None, :], k[:, None] * b_k + j * b_n
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        if WHOLE:
            a = tl.load(a_ptr + a_at, in_m, other=0.0)
            b = tl.load(b_ptr + b_at, in_n, other=0.0)
        else:
            a = tl.load(a_ptr + a_at, in_m & (k[None, :] < K - start), other=0.0)
            b = tl.load(b_ptr + b_at, in_n & (k[:, None] < K - start), other=0.0)
        acc += dot(a, b)
        a_ptr += BLOCK_K
        b_ptr += BLOCK_K * b_k
    return acc


@triton.jit
def _halves(t, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(t, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))


@triton.jit
def quarters(t, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the PARTS column blocks of a tile, from left to right."""
    left, right = _halves(t, BLOCK_M, BLOCK_N)
    return _halves(left, BLOCK_M, BLOCK_N // 2) + _halves(right, BLOCK_M, BLOCK_N // 2)


def tile(shape: tuple[int, ...]) -> dict[str, Any]:
    """Return a launch shape by its names; in the interpreter, few and large programs."""
    m, n, k, warps, stages = (64, 64, 64, 4, 1) if interpreted() else shape
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": GROUP, "num_warps": warps, "num_stages": stages}


def launch_shape(shapes: Shapes, depths: tuple[int, ...], steps: tuple[int, ...], *tensors: Tensor) -> dict[str, Any]:
    """Return the launch shape for factors of `depths` columns whose rows are `steps` apart, and tensors whose last
    dimension is contiguous."""
    even = all(t.data_ptr() % 16 == 0 and t.shape[-1] % 16 == 0 for t in tensors)
    if even and all(step % 16 == 0 for step in steps) and tensors[0].dtype != torch.float32:
        shape = shapes[shared_memory(tensors[0].device)]
        if all(depth % shape[2] == 0 for depth in depths):
            return {**tile(shape), "WHOLE": not interpreted() or all(depth % 64 == 0 for depth in depths)}
    return {**tile(SMALL), "WHOLE": False}


def near_rows(t: Tensor) -> Tensor:
    """Return t (..., C) as (N, C) with contiguous columns, as a view if its rows are near enough to address a tile with
    32 bits."""
    t = as_rows(t)
    return t if t.stride(0) <= MAX_STEP else t.contiguous()


def grid(M: int, N: int, shape: dict[str, Any]) -> tuple[int]:
    """Return the launch grid: a program for each tile of a result (M, N)."""
    return (triton.cdiv(M, shape["BLOCK_M"]) * triton.cdiv(N, shape["BLOCK_N"]),)
