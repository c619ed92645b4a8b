"""Attention, backward (FlashAttention-2, arXiv:2307.08691): dk and dv in one kernel, dq in another, no atomics.

    p = exp(z - lse),  dp = keep / (1 - dropout_p) * dout v^T,  delta = rowsum(dout out) - dlse
    ds = p (dp - delta), softcapped: times 1 - (z / softcap)^2
    dv = (keep / (1 - dropout_p) * p)^T dout,  dk = scale ds^T q,  dq = scale ds k

Each kernel recomputes the scores from q, k and lse. A program of the first loads BLOCK_N keys of one key head and loops
over the queries of all its heads that see them. A program of the second loads BLOCK_M queries and loops over the keys
that they see. Every sum has a fixed order, so gradients are bitwise the same from run to run.
Bytes: q, k, v, dout read twice, out once, dq, dk, dv written; delta (B, H, T) in fp32 written and read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._attention import (
    BAND,
    CAUSAL,
    LOG2E,
    NONE,
    ROWS,
    kept,
    key_blocks,
    load_tile,
    operand,
    power,
    row_range,
    store_tile,
    visible,
)
from ._math import tanh
from ._runtime import dot, jit_kernel, row_dot


# fmt: off
@jit_kernel(do_not_specialize=["H", "T", "N"])
def attention_delta_kernel(
    out_ptr,  # (B, T, H, D)
    dout_ptr,  # (B, T, H, D)
    lse_ptr,  # (B, H, T)
    dlse_ptr,  # (B, H, T) or None
    delta_ptr,  # (B, H, T)
    out_batch, out_row, out_head, dout_batch, dout_row, dout_head, H, T, N, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute delta of BLOCK of the N = B H T rows per program; 0 for a query without keys."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b, h, t = i // T // H, i // T % H, i % T
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (i < N)[:, None] & (d < D)
    out = tl.load(out_ptr + (b * out_batch + h * out_head + t * out_row)[:, None] + d, inside, other=0.0)
    dout = tl.load(dout_ptr + (b * dout_batch + h * dout_head + t * dout_row)[:, None] + d, inside, other=0.0)
    delta = row_dot(out, dout)  # as dp: a query with one key has ds = dp - delta = 0
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + i, i < N, other=0.0)
    lse = tl.load(lse_ptr + i, i < N, other=0.0)
    tl.store(delta_ptr + i, tl.where(lse == -float("inf"), 0.0, delta), i < N)


@triton.jit
def _load_lse(lse_ptr, rows, T, dtype: tl.constexpr):
    """Load lse of these queries in the base of `power`; +inf, which makes p 0, for those without keys and from T on."""
    lse = tl.load(lse_ptr + rows, rows < T, other=float("inf"))
    return tl.where(lse == -float("inf"), float("inf"), lse if dtype == tl.float32 else lse * LOG2E)


@triton.jit
def _dkdv_blocks(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, ranges_ptr, docs_ptr, rng_ptr, q_row, dout_row, start, stop,
    cols,
    head, T, S, back, ahead, scale, cap, threshold, keep_scale, RANGE: tl.constexpr, DOCS: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the contributions of the queries from start to stop to dk and dv (N, BLOCK_D); scores are (N, M)."""
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    doc_k = tl.load(docs_ptr + tl.minimum(cols, T - 1))[:, None] if DOCS else None
    rows = start + tl.arange(0, BLOCK_M)
    lse, delta = _load_lse(lse_ptr, rows, T, dtype), tl.load(delta_ptr + rows, rows < T, other=0.0)
    for m in tl.range(start, stop, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        inside = (lse != float("inf")) if RANGE == ROWS else (rows < T)  # values of queries without keys must not count
        q = load_tile(q_ptr, m, q_row, inside, BLOCK_M, D, BLOCK_D)
        z = dot(k, tl.trans(q)) * scale
        if SOFTCAP:
            t = tanh(z)
            z = cap * t
        p = power(z - lse[None, :], dtype)
        if MASKED:
            lo, hi = row_range(rows, ranges_ptr, T, S, back, ahead, RANGE)
            doc_q = tl.load(docs_ptr + rows, rows < T, other=0)[None, :] if DOCS else None
            seen = visible(cols[:, None], lo[None, :], hi[None, :], doc_q, doc_k, RANGE)
            p = tl.where(seen, p, 0.0)
        if DROPOUT:
            keep = kept(rng_ptr, rows[None, :], cols[:, None], head, threshold)
        dout = load_tile(dout_ptr, m, dout_row, inside, BLOCK_M, D, BLOCK_D)
        dv += dot(operand(tl.where(keep, p, 0.0) if DROPOUT else p, dtype), dout)
        dp = dot(v, tl.trans(dout))
        if DROPOUT:
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - delta[None, :])
        if SOFTCAP:
            ds *= 1.0 - t * t
        if MASKED:
            ds = tl.where(seen, ds, 0.0)  # 0 * NaN of a key that no query sees
        dk += dot(operand(ds, dtype), q)
        rows += BLOCK_M
        lse, delta = _load_lse(lse_ptr, rows, T, dtype), tl.load(delta_ptr + rows, rows < T, other=0.0)
    return dk, dv


@triton.jit
def _query_blocks(start, blocks_ptr, blocks, T, S, back, ahead, RANGE: tl.constexpr, WHOLE: tl.constexpr,
                  M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Return first, left, right and last: the blocks of M queries for the N keys from `start` on.

    Blocks in [first, left) and [right, last) need a mask, blocks in [left, right) do not. Without WHOLE all need one.
    ROWS finds the blocks from the ranges of BLOCK queries each; all need a mask.
    """
    if RANGE == ROWS:
        first, last = blocks, 0
        for c in range(0, blocks, CHUNK):
            j = c + tl.arange(0, CHUNK)
            lo = tl.load(blocks_ptr + 2 * j, j < blocks, other=S)
            hi = tl.load(blocks_ptr + 2 * j + 1, j < blocks, other=0)
            hit = (hi > start) & (lo < start + N)
            first = tl.minimum(first, tl.min(tl.where(hit, j, blocks), 0))
            last = tl.maximum(last, tl.max(tl.where(hit, j + 1, 0), 0))
        return first * BLOCK, first * BLOCK, first * BLOCK, tl.minimum(last * BLOCK, T)
    elif RANGE == NONE:
        return start * 0, start * 0, T if WHOLE else start * 0, T
    else:
        stop = tl.minimum(start + N, S)
        first = tl.maximum(start + 1 - ahead, 0)  # the first query that sees a key; all later ones see one too
        last = T
        if RANGE == BAND:
            last = tl.minimum(stop - back, T)
        if not WHOLE:
            return first, first, first, last
        left = first + tl.cdiv(tl.maximum(tl.minimum(stop - ahead, last) - first, 0), M) * M
        right = last
        if RANGE == BAND:
            right = left + tl.maximum(tl.minimum(start + 1 - back, T) - left, 0) // M * M
        return first, left, right, last


@jit_kernel(do_not_specialize=["H", "G", "T", "S", "blocks", "back", "ahead", "threshold"])
def attention_dkdv_kernel(
    q_ptr,  # (B, T, H, D)
    k_ptr,  # (B, S, H / G, D)
    v_ptr,  # (B, S, H / G, D)
    dout_ptr,  # (B, T, H, D)
    lse_ptr,  # (B, H, T)
    delta_ptr,  # (B, H, T)
    dk_ptr,  # (B, S, H / G, D)
    dv_ptr,  # (B, S, H / G, D), strides as dk's
    ranges_ptr,  # (B, T, 2), ROWS only
    blocks_ptr,  # (B, blocks, 2), ROWS only
    docs_ptr,  # (B, T) or None
    rng_ptr,  # (2): seed and offset, or None
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, dout_batch, dout_row, dout_head,
    dk_batch, dk_row, dk_head, H, G, T, S, blocks, back, ahead, scale, cap, threshold, keep_scale, factor,
    RANGE: tl.constexpr, DOCS: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):
    """Compute BLOCK_N keys of one key head per program, summed over the G heads that read it, in their order."""
    tiles = tl.cdiv(S, BLOCK_N)
    start = tl.program_id(0) % tiles * BLOCK_N
    kv = tl.program_id(0) // tiles  # key head among B H / G
    b, hk = (kv // (H // G)).to(tl.int64), (kv % (H // G)).to(tl.int64)
    if RANGE == ROWS:
        ranges_ptr += b * T * 2
        blocks_ptr += b * blocks * 2
    if DOCS:
        docs_ptr += b * T
    WHOLE: tl.constexpr = not (RANGE == ROWS or SOFTCAP or DROPOUT)
    cols = start + tl.arange(0, BLOCK_N)
    k = load_tile(k_ptr + b * k_batch + hk * k_head, start, k_row, cols < S, BLOCK_N, D, BLOCK_D)
    v = load_tile(v_ptr + b * v_batch + hk * v_head, start, v_row, cols < S, BLOCK_N, D, BLOCK_D)
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first, left, right, last = _query_blocks(
        start, blocks_ptr, blocks, T, S, back, ahead, RANGE, WHOLE, BLOCK_M, BLOCK_N, BLOCK, CHUNK)
    for g in range(G):
        h = hk * G + g
        head = (b * H + h).to(tl.int32)  # among B H
        qh_ptr, doh_ptr = q_ptr + b * q_batch + h * q_head, dout_ptr + b * dout_batch + h * dout_head
        lh_ptr, dh_ptr = lse_ptr + (b * H + h) * T, delta_ptr + (b * H + h) * T
        if (RANGE == CAUSAL or RANGE == BAND) and WHOLE:
            dk, dv = _dkdv_blocks(
                dk, dv, k, v, qh_ptr, doh_ptr, lh_ptr, dh_ptr, ranges_ptr, docs_ptr, rng_ptr, q_row, dout_row, first,
                left,
                cols, head, T, S, back, ahead, scale, cap, threshold, keep_scale, RANGE, DOCS, SOFTCAP, DROPOUT, D,
                BLOCK_D, BLOCK_M, True)
        if WHOLE:
            dk, dv = _dkdv_blocks(
                dk, dv, k, v, qh_ptr, doh_ptr, lh_ptr, dh_ptr, ranges_ptr, docs_ptr, rng_ptr, q_row, dout_row, left,
                right,
                cols, head, T, S, back, ahead, scale, cap, threshold, keep_scale, RANGE, DOCS, SOFTCAP, DROPOUT, D,
                BLOCK_D, BLOCK_M, False)
        if RANGE == BAND or not WHOLE:
            dk, dv = _dkdv_blocks(
                dk, dv, k, v, qh_ptr, doh_ptr, lh_ptr, dh_ptr, ranges_ptr, docs_ptr, rng_ptr, q_row, dout_row, right,
                last,
                cols, head, T, S, back, ahead, scale, cap, threshold, keep_scale, RANGE, DOCS, SOFTCAP, DROPOUT, D,
                BLOCK_D, BLOCK_M, True)
    at = b * dk_batch + hk * dk_head
    store_tile(dk_ptr + at, dk * factor, start, dk_row, S, BLOCK_N, D, BLOCK_D)
    store_tile(dv_ptr + at, dv * keep_scale, start, dk_row, S, BLOCK_N, D, BLOCK_D)


@triton.jit
def _dq_blocks(
    dq, q, dout, lse, delta, k_ptr, v_ptr, k_row, v_row, start, stop, low, high, rows, lo, hi, docs_ptr, rng_ptr, head,
    scale, cap, threshold, keep_scale, T, RANGE: tl.constexpr, DOCS: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):
    """Add the contributions of the keys from start to stop to dq (M, BLOCK_D)."""
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    doc_q = tl.load(docs_ptr + tl.minimum(rows, T - 1))[:, None] if DOCS else None
    for n in tl.range(start, stop, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        inside = (cols >= low) & (cols < high) if MASKED else None
        k = load_tile(k_ptr, n, k_row, inside, BLOCK_N, D, BLOCK_D)
        v = load_tile(v_ptr, n, v_row, inside, BLOCK_N, D, BLOCK_D)
        z = dot(q, tl.trans(k)) * scale
        if SOFTCAP:
            t = tanh(z)
            z = cap * t
        p = power(z - lse[:, None], dtype)
        if MASKED:
            doc_k = tl.load(docs_ptr + cols, inside, other=0)[None, :] if DOCS else None
            p = tl.where(visible(cols[None, :], lo[:, None], hi[:, None], doc_q, doc_k, RANGE), p, 0.0)
        dp = dot(dout, tl.trans(v))
        if DROPOUT:
            keep = kept(rng_ptr, rows[:, None], cols[None, :], head, threshold)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds *= 1.0 - t * t
        dq += dot(operand(ds, dtype), k)
    return dq


@jit_kernel(do_not_specialize=["H", "G", "T", "S", "back", "ahead", "threshold"])
def attention_dq_kernel(
    q_ptr,  # (B, T, H, D)
    k_ptr,  # (B, S, H / G, D)
    v_ptr,  # (B, S, H / G, D)
    dout_ptr,  # (B, T, H, D)
    lse_ptr,  # (B, H, T)
    delta_ptr,  # (B, H, T)
    dq_ptr,  # (B, T, H, D)
    ranges_ptr,  # (B, T, 2), ROWS only
    docs_ptr,  # (B, T) or None
    rng_ptr,  # (2): seed and offset, or None
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, dout_batch, dout_row, dout_head,
    dq_batch, dq_row, dq_head, H, G, T, S, back, ahead, scale, cap, threshold, keep_scale, factor,
    RANGE: tl.constexpr, DOCS: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Compute BLOCK_M queries of one head per program, over the same keys as in forward."""
    tiles = tl.cdiv(T, BLOCK_M)
    start = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    head = tl.program_id(0) // tiles  # among B H
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    k_ptr += b * k_batch + h // G * k_head
    v_ptr += b * v_batch + h // G * v_head
    if RANGE == ROWS:
        ranges_ptr += b * T * 2
    if DOCS:
        docs_ptr += b * T
    WHOLE: tl.constexpr = not (DOCS or SOFTCAP or DROPOUT)
    rows = start + tl.arange(0, BLOCK_M)
    q = load_tile(q_ptr + b * q_batch + h * q_head, start, q_row, rows < T, BLOCK_M, D, BLOCK_D)
    dout = load_tile(dout_ptr + b * dout_batch + h * dout_head, start, dout_row, rows < T, BLOCK_M, D, BLOCK_D)
    lse = _load_lse(lse_ptr + tl.cast(head, tl.int64) * T, rows, T, q_ptr.dtype.element_ty)
    delta = tl.load(delta_ptr + tl.cast(head, tl.int64) * T + rows, rows < T, other=0.0)
    lo, hi = row_range(rows, ranges_ptr, T, S, back, ahead, RANGE)
    first, left, right, last, low = key_blocks(lo, hi, start, T, S, back, ahead, RANGE, WHOLE, BLOCK_M, BLOCK_N)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if (RANGE == BAND or RANGE == ROWS) and WHOLE:
        dq = _dq_blocks(
            dq, q, dout, lse, delta, k_ptr, v_ptr, k_row, v_row, first, left, low, last, rows, lo, hi, docs_ptr,
            rng_ptr,
            head, scale, cap, threshold, keep_scale, T, RANGE, DOCS, SOFTCAP, DROPOUT, D, BLOCK_D, BLOCK_N, True)
    if WHOLE:
        dq = _dq_blocks(
            dq, q, dout, lse, delta, k_ptr, v_ptr, k_row, v_row, left, right, low, last, rows, lo, hi, docs_ptr,
            rng_ptr,
            head, scale, cap, threshold, keep_scale, T, RANGE, DOCS, SOFTCAP, DROPOUT, D, BLOCK_D, BLOCK_N, False)
    dq = _dq_blocks(
        dq, q, dout, lse, delta, k_ptr, v_ptr, k_row, v_row, right, last, low, last, rows, lo, hi, docs_ptr, rng_ptr,
        head, scale, cap, threshold, keep_scale, T, RANGE, DOCS, SOFTCAP, DROPOUT, D, BLOCK_D, BLOCK_N, True)
    dq = tl.where((lse == float("inf"))[:, None], 0.0, dq * factor)  # 0 for queries without keys
    store_tile(dq_ptr + b * dq_batch + h * dq_head, dq, start, dq_row, T, BLOCK_M, D, BLOCK_D)
# fmt: on
