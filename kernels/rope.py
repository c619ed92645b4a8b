"""Rotary position embedding, forward and backward (Su et al. 2021, arXiv:2104.09864).

    (a, b) -> (a cos - sign b sin, b cos + sign a sin) for each pair; backward is the inverse rotation, sign -1

Pairs are (i, i + half) or, interleaved, (2i, 2i + 1) of the first 2 half columns of a head; the other columns stay
unchanged. Bytes: each element is read and written once, cos and sin once per head (from cache); in place, only the
rotated elements are read and written. Saved for backward: only the tables. A position outside the tables gives NaN.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._runtime import (
    Configuration,
    cast,
    ceil_pow2,
    interpreted,
    jit_kernel,
    on_device,
    pointers,
    powers_of_two,
    split_meta,
)

MIN_BLOCK, MAX_BLOCK = 8, 256  # pairs of a head per step; wider heads need several steps


@triton.jit
def _turn(
    x_ptr, y_ptr, x_batch, x_time, x_head, H, turned, cos_ptr, sin_ptr, positions_ptr, positions_batch, tile, N, T, D,
    half, P, sign, INTERLEAVED: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate HEADS of the N * H heads, from number tile * HEADS on. y is contiguous; None rotates in place."""
    if WIDE:
        v = tile.to(tl.int64) * HEADS + tl.arange(0, HEADS)[:, None]  # (HEADS, 1)
    else:
        v = tile * HEADS + tl.arange(0, HEADS)[:, None]
    n = v // H
    inside, turns = n < N, v % H < turned
    b, t, h = (n // T).to(tl.int64), (n % T).to(tl.int64), (v % H).to(tl.int64)
    at = t
    if positions_ptr is not None:
        at = tl.load(positions_ptr + b * positions_batch + t, inside, other=0)
    known = (at >= 0) & (at < P)
    x = x_ptr + b * x_batch + t * x_time + h * x_head
    y = x
    if y_ptr is not None:
        y = y_ptr + v.to(tl.int64) * D
    for start in range(0, half, BLOCK):
        i = start + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
        mask = inside & (i < half)
        cos = tl.load(cos_ptr + at * half + i, mask & known, other=float("nan"))
        sin = tl.load(sin_ptr + at * half + i, mask & known, other=float("nan")) * sign
        if INTERLEAVED:  # load both elements of a pair at once
            j = 2 * start + tl.arange(0, 2 * BLOCK)[None, :]
            both = tl.load(x + j, inside & (j < 2 * half), other=0.0).to(tl.float32)
            u, w = tl.split(tl.reshape(both, [HEADS, BLOCK, 2]))
        else:
            u = tl.load(x + i, mask, other=0.0).to(tl.float32)
            w = tl.load(x + half + i, mask, other=0.0).to(tl.float32)
        u_out, w_out = u * cos - w * sin, w * cos + u * sin
        if y_ptr is not None:
            u_out, w_out = tl.where(turns, u_out, u), tl.where(turns, w_out, w)
        if INTERLEAVED:
            both = tl.reshape(tl.join(u_out, w_out), [HEADS, 2 * BLOCK])
            tl.store(y + j, cast(both, x_ptr.dtype.element_ty), inside & (j < 2 * half))
        else:
            tl.store(y + i, cast(u_out, x_ptr.dtype.element_ty), mask)
            tl.store(y + half + i, cast(w_out, x_ptr.dtype.element_ty), mask)
    if y_ptr is not None:
        for start in range(2 * half, D, BLOCK):
            i = start + tl.arange(0, BLOCK)[None, :]
            tl.store(y + i, tl.load(x + i, inside & (i < D)), inside & (i < D))


_FREE = ["N", "T", "P", "sign", "positions_batch"]  # not worth a compilation for each value


@jit_kernel(do_not_specialize=[*_FREE, "q_tiles"])
def rope_fwd_kernel(
    q_ptr,  # (B, T, H, D), columns contiguous
    k_ptr,  # (B, T, G, D), columns contiguous
    q_out_ptr,  # (B, T, H, D) contiguous
    k_out_ptr,  # (B, T, G, D) contiguous
    cos_ptr,  # (P, half)
    sin_ptr,  # (P, half)
    positions_ptr,  # (B, T), rows positions_batch apart, or None
    q_batch, q_time, q_head, k_batch, k_time, k_head, positions_batch, q_tiles, N, T, H, G, D, half, P, sign,
    INTERLEAVED: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate q in the first q_tiles programs and k in the others."""
    tile = tl.program_id(0)
    if tile < q_tiles:
        _turn(
            q_ptr, q_out_ptr, q_batch, q_time, q_head, H, H, cos_ptr, sin_ptr, positions_ptr, positions_batch, tile, N,
            T, D, half, P, sign, INTERLEAVED, WIDE, HEADS, BLOCK,
        )  # fmt: skip
    else:
        _turn(
            k_ptr, k_out_ptr, k_batch, k_time, k_head, G, G, cos_ptr, sin_ptr, positions_ptr, positions_batch,
            tile - q_tiles, N, T, D, half, P, sign, INTERLEAVED, WIDE, HEADS, BLOCK,
        )  # fmt: skip


@jit_kernel(do_not_specialize=_FREE)
def rope_rows_kernel(
    x_ptr,  # (B, T, H or more, D), columns contiguous
    y_ptr,  # (B, T, H, D) contiguous; None: in place
    cos_ptr,  # (P, half)
    sin_ptr,  # (P, half)
    positions_ptr,  # (B, T), rows positions_batch apart, or None
    x_batch, x_time, x_head, positions_batch, N, T, H, turned, D, half, P, sign,
    INTERLEAVED: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate the first `turned` of H heads; copy the others if y is another tensor."""
    _turn(
        x_ptr, y_ptr, x_batch, x_time, x_head, H, turned, cos_ptr, sin_ptr, positions_ptr, positions_batch,
        tl.program_id(0), N, T, D, half, P, sign, INTERLEAVED, WIDE, HEADS, BLOCK,
    )  # fmt: skip


def tile_meta(half: int) -> dict[str, int]:
    """Return a tile of 512 pairs, 4 per thread (interpreter: larger). 8 per thread spill in fp16 or unaligned."""
    block = min(max(ceil_pow2(half), MIN_BLOCK), MAX_BLOCK)
    return {"HEADS": (1 << 16 if interpreted() else 512) // block, "BLOCK": block, "num_warps": 4}


def _whole_columns(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _launch(heads: int, N: int, half: int) -> tuple[dict[str, int], int, bool]:
    """Return the launch shape, the programs for N * heads heads, and whether to count these in 64 bits."""
    meta = tile_meta(half)
    return meta, triton.cdiv(N * heads, meta["HEADS"]), N * heads + meta["HEADS"] >= 2**31


def _tables(cos: Tensor, sin: Tensor, positions: Tensor | None) -> tuple[tuple[Tensor, Tensor, Tensor | None], int]:
    """Return cos, sin and positions, contiguous, and the distance between the positions of two batches (0: shared)."""
    if positions is None:
        return (cos.contiguous(), sin.contiguous(), None), 0
    return (cos.contiguous(), sin.contiguous(), positions.contiguous()), positions.shape[-1] * (positions.dim() - 1)


def rope_fwd(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Return q and k rotated (inverse: rotated back), contiguous."""
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    if q.numel() + k.numel() == 0:
        return q_out, k_out
    q, k = _whole_columns(q), _whole_columns(k)
    (B, T, H, D), G, (P, half) = q.shape, k.shape[2], cos.shape
    meta, q_tiles, wide_q = _launch(H, B * T, half)
    _, k_tiles, wide_k = _launch(G, B * T, half)
    tables, positions_batch = _tables(cos, sin, positions)
    with on_device(q):
        rope_fwd_kernel[(q_tiles + k_tiles,)](
            q, k, q_out, k_out, *tables, *q.stride()[:3], *k.stride()[:3], positions_batch, q_tiles, B * T, T, H, G, D,
            half, P, -1.0 if inverse else 1.0, INTERLEAVED=interleaved, WIDE=wide_q or wide_k, **meta,
        )  # fmt: skip
    return q_out, k_out


def _rows(
    x: Tensor, y: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None, n_turned: int, interleaved: bool,
    inverse: bool,
) -> None:  # fmt: skip
    (B, T, H, D), (P, half) = x.shape, cos.shape
    H = n_turned if y is None else H
    if B * T * H * D == 0:
        return
    meta, tiles, wide = _launch(H, B * T, half)
    tables, positions_batch = _tables(cos, sin, positions)
    with on_device(x):
        rope_rows_kernel[(tiles,)](
            x, y, *tables, *x.stride()[:3], positions_batch, B * T, T, H, n_turned, D, half, P,
            -1.0 if inverse else 1.0, INTERLEAVED=interleaved, WIDE=wide, **meta,
        )  # fmt: skip


def rope_rows(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, n_turned: int, interleaved: bool, inverse: bool
) -> None:
    """Rotate the first n_turned heads of qkv (B, T, H, D) in place.

    Raises:
        ValueError: the columns of qkv are not contiguous.
    """
    if _whole_columns(qkv) is not qkv:
        raise ValueError(f"rope_rows: qkv has strides {qkv.stride()}, expected contiguous columns")
    _rows(qkv, None, cos, sin, positions, n_turned, interleaved, inverse)


def rope_copy(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, n_turned: int, interleaved: bool, inverse: bool
) -> Tensor:
    """Return a new contiguous tensor with what `rope_rows` would write."""
    out = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    _rows(_whole_columns(qkv), out, cos, sin, positions, n_turned, interleaved, inverse)
    return out


def configurations(dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Iterator[Configuration]:
    """Yield every launch shape with both pairings, with positions and without, counted in 32 and in 64 bits."""
    f32, i64 = torch.float32, torch.int64
    sizes = {n: "i32" for n in ("positions_batch", "N", "T", "H", "D", "half", "P")} | {"sign": "fp32"}
    for block in powers_of_two(MIN_BLOCK, MAX_BLOCK):
        meta, warps = split_meta(tile_meta(block))
        for interleaved in (False, True):
            for full in (False, True):
                tables = pointers(cos_ptr=f32, sin_ptr=f32, positions_ptr=i64 if full else None)
                common = {**tables, **sizes, "INTERLEAVED": interleaved, "WIDE": full}
                case = f"half={block} {'interleaved' if interleaved else 'halves'}{' positions wide' if full else ''}"
                ptrs = pointers(q_ptr=dtype, k_ptr=dtype, q_out_ptr=dtype, k_out_ptr=dtype)
                own = {n: "i32" for n in ("q_batch", "q_time", "q_head", "k_batch", "k_time", "k_head", "q_tiles", "G")}
                yield Configuration(rope_fwd_kernel, case, {**ptrs, **own, **common}, warps, meta)
                own = {n: "i32" for n in ("x_batch", "x_time", "x_head", "turned")}
                for y in (None, dtype):
                    ptrs, name = pointers(x_ptr=dtype, y_ptr=y), f"{case} {'in place' if y is None else 'copy'}"
                    yield Configuration(rope_rows_kernel, name, {**ptrs, **own, **common}, warps, meta)
