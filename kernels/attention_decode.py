"""Attention of a few queries over a long cache, split over the keys (Flash-Decoding, Dao et al. 2023).

    z = scale q k^T, softcapped: softcap tanh(z / softcap), masked;  out = softmax(z) v, over a split, then over splits

Fused: scores, mask, online softmax, product with v. A program has BLOCK_M rows of one key head (a row is a query of one
of the heads that share the key head) and every SPLITS-th block of keys, so short rows are spread over the splits, too.
It stores its sums; a second kernel adds the splits of a row. A split without keys stores that its sum is 0 and ends.
The number of splits depends on shapes and the number of multiprocessors only, so a launch can be recorded.
With pages, the keys of a block are loaded from the pages of the table; the rest is the same.
Bytes: k and v once for each BLOCK_M rows, q read and out written, 4 (D + 2) for each row and split. Saved: nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention import LOG2E, load_tile, operand, power
from ._attention_tiles import columns, tiled
from ._math import tanh
from ._runtime import (
    INTERPRETED,
    Configuration,
    cast,
    ceil_pow2,
    dot,
    interpreted,
    jit_kernel,
    on_device,
    pointers,
    processors,
)

PROGRAMS = 2  # on a multiprocessor: what the number of splits aims at
MOST_SPLITS = 64


# fmt: off
@triton.jit
def _range(row, G, T, S, kv_lens_ptr, kv_start_ptr, b, window):
    """Return the keys [lo, hi) that a row sees, as `attention` with causal order; S and 0 if there is none."""
    position = row // G + S - T
    hi = tl.minimum(position + 1, S)
    lo = tl.maximum(position + 1 - window, 0)
    if kv_lens_ptr is not None:
        hi = tl.minimum(hi, tl.load(kv_lens_ptr + b))
    if kv_start_ptr is not None:
        lo = tl.maximum(lo, tl.load(kv_start_ptr + b))
    seen = (lo < hi) & (row < T * G)
    return tl.where(seen, lo, S), tl.where(seen, hi, 0)


@triton.jit
def _load_paged(
    ptr, n, row, batch, page, page_bits, some, BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Load (BLOCK_N, BLOCK_D) keys or values from n on, zero where not `some` (BLOCK_N).

    page: the page of each in the pool. batch: distance between pages.
    """
    UNIT: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    slot = (n + tl.arange(0, BLOCK_N)) & ((1 << page_bits) - 1)
    at, d = tl.multiple_of(page.to(tl.int64) * batch + slot * row, UNIT), tl.arange(0, BLOCK_D)[None, :]
    x = tl.load(ptr + at[:, None] + d, some[:, None] & (d < D), other=0.0)
    return x.to(tl.float32) if INTERPRETED else x


@jit_kernel(do_not_specialize=["n_heads", "G", "T", "S", "chunks", "splits", "window", "n_pages", "page_bits"])
def attention_decode_fwd_kernel(
    q_ptr,  # (B, T, H, D)
    k_ptr,  # (B, S, H / G, D); with pages (n_pages, 2^page_bits, H / G, D)
    v_ptr,  # as k
    out_ptr,  # (B, T, H, D) contiguous; ONE only
    sums_ptr,  # (B H / G, T G, splits, D), not divided by the sum of powers; not ONE
    stats_ptr,  # (B H / G, T G, splits, 2): largest score, sum of powers; not ONE
    kv_lens_ptr,  # (B) or None
    kv_start_ptr,  # (B) or None
    pages_ptr,  # (B, S / 2^page_bits) or None
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, n_heads, G, T, S, chunks, splits, window,
    n_pages, page_bits, scale, cap, SOFTCAP: tl.constexpr, ONE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Compute BLOCK_M rows of one key head for one split per program.

    scale: of the scores, in the base of `power`; with SOFTCAP, scale / softcap. cap: softcap, in the base of `power`.
    """
    split, chunk = tl.program_id(0) % splits, tl.program_id(0) // splits % chunks
    head = (tl.program_id(0) // splits // chunks).to(tl.int64)  # among B H / G
    b, h = head // n_heads, head % n_heads
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    row = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < T * G
    lo, hi = _range(row, G, T, S, kv_lens_ptr, kv_start_ptr, b, window)
    low, high = tl.min(lo, 0), tl.max(hi, 0)
    at = head * T * G + row  # among all rows
    d = tl.arange(0, BLOCK_D)
    q_at = b * q_batch + (row // G).to(tl.int64) * q_row + (h * G + row % G) * q_head
    q = tl.load(q_ptr + q_at[:, None] + d[None, :], inside[:, None] & (d[None, :] < D), other=0.0)
    q = q.to(tl.float32) if INTERPRETED else q
    k_ptr += h * k_head
    v_ptr += h * v_head
    if pages_ptr is None:
        k_ptr += b * k_batch
        v_ptr += b * v_batch
    else:
        pages_ptr += b * (S >> page_bits)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top, total = tl.full([BLOCK_M], -float("inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for n in tl.range((low // BLOCK_N + split) * BLOCK_N, high, splits * BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        some = (cols >= low) & (cols < high)  # other keys may be uninitialised
        if pages_ptr is None:
            k = load_tile(k_ptr, n, k_row, some, BLOCK_N, D, BLOCK_D)
        else:
            page = tl.load(pages_ptr + (cols >> page_bits), some, other=0)
            lost = (page < 0) | (page >= n_pages)
            some = some & (lost == 0)
            k = _load_paged(k_ptr, n, k_row, k_batch, page, page_bits, some, BLOCK_N, D, BLOCK_D)
        z = dot(q, tl.trans(k)) * scale
        if SOFTCAP:
            z = cap * tanh(z)
        if pages_ptr is not None:
            z = tl.where(lost[None, :], float("nan"), z)
        z = tl.where((cols[None, :] >= lo[:, None]) & (cols[None, :] < hi[:, None]), z, -float("inf"))
        peak = tl.maximum(top, tl.max(z, 1))
        base = tl.where(peak == -float("inf"), 0.0, peak)  # no key yet: the power of -inf - 0 is 0
        p, shrink = power(z - base[:, None], dtype), power(top - base, dtype)
        total = total * shrink + tl.sum(p, 1)
        if pages_ptr is None:
            v = load_tile(v_ptr, n, v_row, some, BLOCK_N, D, BLOCK_D)
        else:
            v = _load_paged(v_ptr, n, v_row, v_batch, page, page_bits, some, BLOCK_N, D, BLOCK_D)
        acc = acc * shrink[:, None] + dot(operand(p, dtype), v)
        top = peak
    keep = inside[:, None] & (d[None, :] < D)
    if ONE:
        out = acc / tl.where(total != 0.0, total, 1.0)[:, None]
        number = (b * T + row // G) * n_heads * G + h * G + row % G
        tl.store(out_ptr + number[:, None] * D + d[None, :], cast(out, dtype), keep)
    else:
        part = at * splits + split
        tl.store(stats_ptr + 2 * part, top, inside)
        tl.store(stats_ptr + 2 * part + 1, total, inside)
        tl.store(sums_ptr + part[:, None] * D + d[None, :], acc, keep & (total != 0.0)[:, None])


@jit_kernel(do_not_specialize=["n_heads", "G", "T", "splits"])
def attention_decode_fwd_add_kernel(
    out_ptr,  # (B, T, H, D) contiguous
    sums_ptr,  # (B H / G, T G, splits, D)
    stats_ptr,  # (B H / G, T G, splits, 2)
    n_heads, G, T, splits, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):
    """Add the splits of one row per program."""
    at = tl.program_id(0).to(tl.int64)
    head, row = at // (T * G), at % (T * G)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    s, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    part = at * splits + s
    top = tl.load(stats_ptr + 2 * part, s < splits, other=-float("inf"))
    total = tl.load(stats_ptr + 2 * part + 1, s < splits, other=0.0)
    peak = tl.max(top, 0)
    factor = tl.where(total != 0.0, power(top - tl.where(peak == -float("inf"), 0.0, peak), dtype), 0.0)
    known = (factor != 0.0)[:, None] & (d[None, :] < D)  # others were not written
    sums = tl.load(sums_ptr + part[:, None] * D + d[None, :], known, other=0.0)
    total = tl.sum(total * factor, 0)
    out = tl.sum(sums * factor[:, None], 0) / tl.where(total != 0.0, total, 1.0)
    number = (head // n_heads * T + row // G) * n_heads * G + head % n_heads * G + row % G
    tl.store(out_ptr + number * D + d, cast(out, dtype), d < D)
# fmt: on


def _tile(rows: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the launch shape for this many rows of a key head and columns; tl.dot needs 16 rows."""
    if interpreted():
        return {"BLOCK_M": max(16, min(64, ceil_pow2(rows))), "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}
    if dtype == torch.float32:
        return {"BLOCK_M": 16, "BLOCK_N": 32 if width <= 64 else 16, "num_warps": 4, "num_stages": 1}
    keys, stages = 64 if width <= 128 else 32, 3 if width <= 64 else 2
    return {"BLOCK_M": 16, "BLOCK_N": keys, "num_warps": 8 if width > 128 else 4, "num_stages": stages}


def _splits(programs: int, blocks: int, device: torch.device) -> int:
    """Return the number of splits for this many programs without splits and blocks of keys."""
    wanted = triton.cdiv(PROGRAMS * processors(device), max(1, programs))
    return max(1, min(wanted, blocks, MOST_SPLITS))


def attention_decode_fwd(
    q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None, kv_start: Tensor | None, scale: float, window: int,
    softcap: float,
) -> Tensor:  # fmt: skip
    """Return out (B, T, H, D), contiguous."""
    return _decode(q, k, v, None, k.shape[1], kv_lens, kv_start, scale, window, softcap)


def attention_decode_paged_fwd(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, kv_lens: Tensor | None, kv_start: Tensor | None, scale: float,
    window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """Return out (B, T, H, D), contiguous. pages: (B, pages of a row) int32, contiguous."""
    return _decode(q, k, v, pages, pages.shape[1] * k.shape[1], kv_lens, kv_start, scale, window, softcap)


def _decode(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor | None, S: int, kv_lens: Tensor | None, kv_start: Tensor | None,
    scale: float, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    (B, T, H, width), heads, device = q.shape, k.shape[2], q.device
    pool = (k.shape[0], k.shape[1].bit_length() - 1)  # number of pages, log2 of the slots of one
    q, k, v = tiled(q), tiled(k), tiled(v)
    D = q.shape[3]
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=device)
    if out.numel() == 0:
        return out[..., :width]
    G = H // heads
    shape = _tile(T * G, columns(D), q.dtype)
    chunks = triton.cdiv(T * G, shape["BLOCK_M"])
    splits = _splits(B * heads * chunks, triton.cdiv(S, shape["BLOCK_N"]), device)
    sums = stats = None
    if splits > 1:
        sums = torch.empty((B * heads * T * G * splits, D), device=device)
        stats = torch.empty((B * heads * T * G * splits, 2), device=device)
    base = 1.0 if q.dtype == torch.float32 else LOG2E.value  # the base of `power`
    inner = scale / softcap if softcap > 0 else scale * base
    sizes = (heads, G, T, S, chunks, splits, window if 0 < window < S else S, *pool)
    with on_device(q):
        attention_decode_fwd_kernel[(B * heads * chunks * splits,)](
            q, k, v, out, sums, stats, kv_lens, kv_start, pages, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *sizes, inner, softcap * base, softcap > 0, splits == 1, D, columns(D), **shape)  # fmt: skip
        if splits > 1:
            attention_decode_fwd_add_kernel[(B * T * H,)](
                out, sums, stats, heads, G, T, splits, D, columns(D), ceil_pow2(splits), num_warps=4)  # fmt: skip
    return out if D == width else out[..., :width].contiguous()


def configurations(dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Iterator[Configuration]:
    """Yield every launch shape by head dimension and options; dimensions in between are padded."""
    if weight_dtype not in (None, dtype):
        return
    f32, i32 = torch.float32, torch.int32
    strides = dict.fromkeys((f"{t}_{of}" for t in "qkv" for of in ("batch", "row", "head")), "i32")
    numbers = ("n_heads", "G", "T", "S", "chunks", "splits", "window", "n_pages", "page_bits")
    sizes = dict.fromkeys(numbers, "i32") | {"scale": "fp32", "cap": "fp32"}
    for D in (16, 40, 64, 80, 96, 128, 256):
        full = D in (64, 128, 256)
        shape = _tile(1, columns(D), dtype)
        launch: dict[str, Any] = {"num_stages": shape.pop("num_stages"), "quick": D in (64, 128)}
        warps = shape.pop("num_warps")
        options = ((True, False, False), (False, True, False), (False, False, True), (True, True, True))
        for one, softcap, paged in options if full else ((False, False, False), (False, False, True)):
            arguments = pointers(q_ptr=dtype, k_ptr=dtype, v_ptr=dtype, out_ptr=dtype)
            arguments |= pointers(sums_ptr=None if one else f32, stats_ptr=None if one else f32)
            arguments |= pointers(kv_lens_ptr=i32, kv_start_ptr=i32 if softcap else None)
            arguments |= pointers(pages_ptr=i32 if paged else None) | strides | sizes
            meta = {"SOFTCAP": softcap, "ONE": one, "D": D, "BLOCK_D": columns(D), **shape}
            case = f"D={D} {'one split' if one else 'splits'}{' softcap' if softcap else ''}{' pages' if paged else ''}"
            yield Configuration(attention_decode_fwd_kernel, case, arguments, warps, meta, **launch)
        arguments = pointers(out_ptr=dtype, sums_ptr=f32, stats_ptr=f32)
        arguments |= dict.fromkeys(("n_heads", "G", "T", "splits"), "i32")
        meta = {"D": D, "BLOCK_D": columns(D), "BLOCK_S": MOST_SPLITS}
        yield Configuration(attention_decode_fwd_add_kernel, f"D={D}", arguments, 4, meta, quick=D == 128)
