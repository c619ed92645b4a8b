"""The products of a GELU MLP on both sides of the activation, with the activation in their epilogues.

    forward    u = x W^T (N, F),  h = gelu(u + bias)                               x (N, C), W (F, C)
    backward   du = (dy V) gelu'(u + bias) (N, F),  dbias = sum_N(du)              dy (N, C), V (C, F)

gelu by erf or tanh, formulas in _math.py. u is rounded to its dtype before GELU sees it, as if it had been read from
memory, so backward computes the slope at the same place. dy V is not rounded.

Fused: product and activation; product, slope and the sums of dbias. The passes of bias_gelu over (N, F) go: forward
reads u (N, F) no more, backward neither writes nor reads dy V.
Bytes: forward reads x and W, writes u and h; backward reads dy, V and u, writes du. Tiles of x, dy and the weights are
read again from L2 (_product.py).
Saved for backward: u and bias.
dbias is a sum of partials, one for each row tile (_partials.py), so results are bitwise deterministic.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_tiles import CHIPS
from ._math import gelu, gelu_tanh
from ._partials import add_partials, add_partials_configuration
from ._product import PARTS, SMALL, grid, launch_shape, near_rows, place, product, quarters, tile
from ._runtime import Configuration, cast, column_sum, jit_kernel, on_device, pointers

PROGRAMS = 2  # that fit on a multiprocessor: the products of one run while the other is in its epilogue
WHOLE = {227: (128, 128, 64, 8, 3), 163: (128, 128, 32, 8, 4), 99: (128, 128, 32, 8, 3)}


@triton.jit
def _gelu_at(u, bias_ptr, c, N, TANH: tl.constexpr):
    """Return value and slope of gelu(u + bias) in fp32, for u (BLOCK_M, columns) and columns c."""
    v = u.to(tl.float32)
    if bias_ptr is not None:
        v += tl.load(bias_ptr + c, c < N, other=0.0).to(tl.float32)
    if TANH:
        value, slope = gelu_tanh(v)
    else:
        value, slope = gelu(v)
    return value, slope


@jit_kernel(do_not_specialize=["M"])
def gelu_mlp_fwd_kernel(
    x_ptr,  # (M, K), rows x_row apart
    weight_ptr,  # (N, K) contiguous
    bias_ptr,  # (N) or None
    u_ptr,  # (M, N) contiguous
    h_ptr,  # (M, N) contiguous
    x_row, M, N, K, TANH: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute one tile of u and h per program."""
    m, n = place(M, N, BLOCK_M, BLOCK_N, GROUP)
    acc = product(x_ptr, weight_ptr, m, n, M, N, K, x_row, 1, K, BLOCK_M, BLOCK_N, BLOCK_K, WHOLE)
    tiles = quarters(acc, BLOCK_M, BLOCK_N)
    row = (m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)  # (BLOCK_M, 1)
    PART: tl.constexpr = BLOCK_N // PARTS
    for part in tl.static_range(PARTS):
        c = n * BLOCK_N + part * PART + tl.arange(0, PART)[None, :]  # (1, PART)
        mask = (row < M) & (c < N)
        u = cast(tiles[part], u_ptr.dtype.element_ty)
        tl.store(u_ptr + row * N + c, u, mask)
        h, _ = _gelu_at(u, bias_ptr, c, N, TANH)
        tl.store(h_ptr + row * N + c, cast(h, h_ptr.dtype.element_ty), mask)


@jit_kernel(do_not_specialize=["M"])
def gelu_mlp_bwd_kernel(
    dy_ptr,  # (M, K), rows dy_row apart
    weight_ptr,  # (K, N) contiguous
    u_ptr,  # (M, N) contiguous
    bias_ptr,  # (N) or None
    du_ptr,  # (M, N) contiguous
    partials_ptr,  # (row tiles, 1, N): dbias; or None
    dy_row, M, N, K, TANH: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute one tile of du and the sums of its columns per program."""
    m, n = place(M, N, BLOCK_M, BLOCK_N, GROUP)
    acc = product(dy_ptr, weight_ptr, m, n, M, N, K, dy_row, N, 1, BLOCK_M, BLOCK_N, BLOCK_K, WHOLE)
    tiles = quarters(acc, BLOCK_M, BLOCK_N)
    row = (m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)  # (BLOCK_M, 1)
    PART: tl.constexpr = BLOCK_N // PARTS
    for part in tl.static_range(PARTS):
        c = n * BLOCK_N + part * PART + tl.arange(0, PART)[None, :]  # (1, PART)
        mask = (row < M) & (c < N)
        u = tl.load(u_ptr + row * N + c, mask, other=0.0)
        _, slope = _gelu_at(u, bias_ptr, c, N, TANH)
        d = tiles[part] * slope
        tl.store(du_ptr + row * N + c, cast(d, du_ptr.dtype.element_ty), mask)
        if partials_ptr is not None:
            total = column_sum(tl.where(mask, d, 0.0))  # the slope at a masked bias may be NaN
            tl.store(partials_ptr + m.to(tl.int64) * N + c, total, c < N)


def gelu_mlp_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    """Return u = x W^T and h = gelu(u + bias), (N, F) contiguous, for x (N, C) and weight (F, C)."""
    x, weight = near_rows(x), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    (M, K), N = x.shape, weight.shape[0]
    u, h = x.new_empty((M, N)), x.new_empty((M, N))
    if u.numel() == 0:
        return u, h
    shape = launch_shape(WHOLE, (K,), (x.stride(0),), x, weight, u, h, *(() if bias is None else (bias,)))
    with on_device(x):
        gelu_mlp_fwd_kernel[grid(M, N, shape)](x, weight, bias, u, h, x.stride(0), M, N, K, TANH=tanh, **shape)
    return u, h


def gelu_mlp_bwd(
    dy: Tensor, weight: Tensor, u: Tensor, bias: Tensor | None, tanh: bool
) -> tuple[Tensor, Tensor | None]:
    """Return du and dbias (None without bias) for dy (N, C), weight (C, F) and u (N, F)."""
    dy, weight, u = near_rows(dy), weight.contiguous(), u.contiguous()
    bias = None if bias is None else bias.contiguous()
    (M, K), N = dy.shape, weight.shape[1]
    du = torch.empty_like(u)
    if du.numel() == 0:
        return du, None if bias is None else torch.zeros_like(bias)
    dbias = None if bias is None else torch.empty_like(bias)
    shape = launch_shape(WHOLE, (K,), (dy.stride(0),), dy, weight, u, du, *(() if bias is None else (bias,)))
    partials = None if bias is None else u.new_empty((triton.cdiv(M, shape["BLOCK_M"]), 1, N), dtype=torch.float32)
    with on_device(dy):
        gelu_mlp_bwd_kernel[grid(M, N, shape)](
            dy, weight, u, bias, du, partials, dy.stride(0), M, N, K, TANH=tanh, **shape
        )
        if partials is not None:
            add_partials(partials, dbias)
    return du, dbias


def configurations(dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Iterator[Configuration]:
    """Yield every launch shape of this file, with and without bias, by erf and by tanh."""
    shapes: list[tuple[tuple[int, ...], tuple[int, ...] | None]] = [(SMALL, None)]
    if dtype != torch.float32:
        shapes += [(WHOLE[kb], chips) for kb, chips in CHIPS.items()]
    sizes = {"M": "i32", "N": "i32", "K": "i32"}
    for (shape, chips), tanh, full in itertools.product(shapes, (False, True), (True, False)):
        w, partial = ((weight_dtype or dtype), torch.float32) if full else (None, None)
        whole = chips is not None
        case = f"{'whole' if whole else 'any'} {'tanh' if tanh else 'erf'} {'full' if full else 'plain'}"
        launch = tile(shape)
        options: dict[str, Any] = dict(num_warps=launch.pop("num_warps"), num_stages=launch.pop("num_stages"))
        options |= dict(archs=chips, programs=PROGRAMS if whole else None, quick=full == tanh, aligned=whole)
        flags = {**launch, "TANH": tanh, "WHOLE": whole}
        types = pointers(x_ptr=dtype, weight_ptr=dtype, bias_ptr=w, u_ptr=dtype, h_ptr=dtype)
        yield Configuration(gelu_mlp_fwd_kernel, case, {**types, **sizes, "x_row": "i32"}, constexprs=flags, **options)
        types = pointers(dy_ptr=dtype, weight_ptr=dtype, u_ptr=dtype, bias_ptr=w, du_ptr=dtype, partials_ptr=partial)
        yield Configuration(gelu_mlp_bwd_kernel, case, {**types, **sizes, "dy_row": "i32"}, constexprs=flags, **options)
    yield add_partials_configuration("dbias of an MLP", weight_dtype or dtype)
