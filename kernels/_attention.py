"""The shared parts of the attention kernels: tiles, scores, masks, dropout, and the keys that a query sees.

Causal order, windows, key lengths, key starts and packed sequences all give each query i one range of keys [lo, hi):

    NONE    every key
    CAUSAL  [0, i + ahead), one number
    BAND    [i + back, i + ahead), two numbers: a window, with or without causal order
    ROWS    a separate range for each query, from `attention_ranges_kernel`; document ids are compared as well

Ranges are clipped to [0, S). A key block that every query of a block sees completely is computed without a mask. Ranges
are computed on the device, so there is no synchronisation and no maximum length.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._runtime import INTERPRETED, cast, exp, exp2, jit_kernel

NONE, CAUSAL, BAND, ROWS = (tl.constexpr(i) for i in range(4))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def operand(x, dtype: tl.constexpr):
    """Round x to `dtype` for a tl.dot; the interpreter multiplies the rounded values in fp32."""
    if INTERPRETED:
        return cast(x, dtype).to(tl.float32)
    else:
        return cast(x, dtype)


@triton.jit
def power(x, dtype: tl.constexpr):
    """Return 2^x for 16 bits and e^x for fp32.

    16-bit scores are in base 2: their scale contains log2 e. In fp32, x near 0, where p is large, is exact only if lse
    is subtracted before the product with log2 e.
    """
    return exp(x) if dtype == tl.float32 else exp2(x)


@triton.jit
def _addresses(ptr, start, stride, SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return pointers to (SIZE, BLOCK_D) rows from `start` on, with 32-bit offsets inside the tile.

    Launchers ensure that every row starts at a multiple of 16 bytes.
    """
    r, d = tl.arange(0, SIZE)[:, None], tl.arange(0, BLOCK_D)[None, :]
    UNIT: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    base = tl.multiple_of(ptr + tl.cast(start, tl.int64) * stride, 16)
    return base + (tl.multiple_of(r * stride, [UNIT, UNIT]) + d)


@triton.jit
def load_tile(ptr, start, stride, inside, SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load (SIZE, BLOCK_D) rows from `start` on; zero from column D on and where not `inside` (SIZE; None: all)."""
    at, d = _addresses(ptr, start, stride, SIZE, BLOCK_D), tl.arange(0, BLOCK_D)[None, :]
    if inside is not None:
        x = tl.load(at, inside[:, None] & (d < D), other=0.0)
    elif D < BLOCK_D:
        x = tl.load(at, d < D, other=0.0)
    else:
        x = tl.load(at)
    return x.to(tl.float32) if INTERPRETED else x


@triton.jit
def store_tile(ptr, x, start, stride, high, SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store x (SIZE, BLOCK_D) at rows from `start` on, only rows below `high` and columns below D."""
    at, d = _addresses(ptr, start, stride, SIZE, BLOCK_D), tl.arange(0, BLOCK_D)[None, :]
    tl.store(at, cast(x, ptr.dtype.element_ty), (start + tl.arange(0, SIZE)[:, None] < high) & (d < D))


@triton.jit
def kept(rng_ptr, rows, cols, head, threshold):
    """Return where dropout keeps (row, col) of head 0 to B H - 1, like dropout_keep of fastgpt/ops/_attention.py."""
    offset = tl.load(rng_ptr + 1).to(tl.uint32)
    word, _, _, _ = tl.philox(tl.load(rng_ptr), cols, rows, head, offset, n_rounds=7)
    return word >= threshold.to(tl.uint32)


@triton.jit
def row_range(rows, ranges_ptr, T, S, back, ahead, RANGE: tl.constexpr):
    """Return [lo, hi) of one or more queries, those from T on like the last. ranges_ptr: of this batch, ROWS only."""
    at = tl.minimum(rows, T - 1)
    if RANGE == ROWS:
        return tl.load(ranges_ptr + 2 * at), tl.load(ranges_ptr + 2 * at + 1)
    elif RANGE == NONE:
        return at * 0, at * 0 + S
    else:
        lo = tl.maximum(at + back, 0) if RANGE == BAND else at * 0
        return lo, tl.maximum(tl.minimum(at + ahead, S), 0)


@triton.jit
def key_blocks(
    lo, hi, start, T, S, back, ahead, RANGE: tl.constexpr, WHOLE: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """Return first, left, right, last and low: the blocks of N keys for the M queries from `start` on.

    Blocks in [first, left) and [right, last) need a mask, blocks in [left, right) do not; without WHOLE all need one.
    No query of the block sees a key below `low`.
    """
    if RANGE == ROWS:
        low, some, every, last = tl.min(lo, 0), tl.max(lo, 0), tl.min(hi, 0), tl.max(hi, 0)
    else:  # ranges increase with the query
        low, every = row_range(start, None, T, S, back, ahead, RANGE)
        some, last = row_range(start + M - 1, None, T, S, back, ahead, RANGE)
    first = low // N * N
    if not WHOLE:
        return first, first, first, last, low
    left = tl.maximum(first, tl.minimum(tl.cdiv(some, N), tl.cdiv(last, N)) * N)
    right = tl.maximum(left, every // N * N)
    return first, left, right, last, low


@triton.jit
def visible(cols, lo, hi, doc_q, doc_k, RANGE: tl.constexpr):
    """Return the mask of a block from the ranges and (if not None) documents of its queries; shapes are broadcast."""
    seen = cols < hi
    if RANGE == BAND or RANGE == ROWS:
        seen = seen & (cols >= lo)
    if doc_q is not None:
        seen = seen & (doc_q == doc_k)
    return seen


@triton.jit
def _segments(cu_q_ptr, i, n, steps):
    """Count by bisection how many of cu_q[1:] are <= i: the packed sequence of row i, n after the last one."""
    low, high = i * 0, i * 0 + n
    for _ in range(steps):
        middle = (low + high) // 2
        above = tl.load(cu_q_ptr + 1 + middle, low < high, other=0) <= i
        low, high = tl.where((low < high) & above, middle + 1, low), tl.where((low < high) & ~above, middle, high)
    return low


@triton.jit
def _same_documents(docs_ptr, i, T, CHUNK: tl.constexpr):
    """Return first and end of the keys whose document is between the smallest and the largest of the rows i."""
    own = tl.load(docs_ptr + i, i < T, other=0)
    low, high = tl.min(tl.where(i < T, own, 0x7FFFFFFF), 0), tl.max(tl.where(i < T, own, -0x80000000), 0)
    first, end = T + 0, T * 0
    for start in range(0, T, CHUNK):
        j = start + tl.arange(0, CHUNK)
        doc = tl.load(docs_ptr + j, j < T, other=0)
        hit = (doc >= low) & (doc <= high) & (j < T)
        first = tl.minimum(first, tl.min(tl.where(hit, j, T), 0))
        end = tl.maximum(end, tl.max(tl.where(hit, j + 1, 0), 0))
    return first, end


@jit_kernel(do_not_specialize=["n", "steps", "T", "S", "causal", "window"])
def attention_ranges_kernel(
    cu_q_ptr,  # (n + 1) or None
    cu_k_ptr,  # (n + 1) or None
    docs_ptr,  # (B, T) or None
    kv_lens_ptr,  # (B) or None
    kv_start_ptr,  # (B) or None
    ranges_ptr,  # (B, T, 2): lo and hi of each query; S and 0 for one without keys
    blocks_ptr,  # (B, blocks, 2): smallest lo and largest hi of each block of BLOCK queries
    n, steps, T, S, causal, window, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Compute one block of queries of one batch per program: blocks along axis 0, batches along axis 1."""
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lo, hi, shift = i * 0, i * 0 + S, i * 0 + (S - T)
    if cu_q_ptr is not None:
        segment = _segments(cu_q_ptr, i, n, steps)
        inside = segment < n
        lo = tl.load(cu_k_ptr + segment, inside, other=0)
        hi = tl.load(cu_k_ptr + segment + 1, inside, other=0)
        shift = hi - tl.load(cu_q_ptr + segment + 1, inside, other=0)
    else:
        if kv_lens_ptr is not None:
            hi = tl.minimum(i * 0 + tl.load(kv_lens_ptr + b), S)
        if kv_start_ptr is not None:
            lo = i * 0 + tl.load(kv_start_ptr + b)
    if causal:
        hi = tl.minimum(hi, i + shift + 1)
    if window > 0:
        lo = tl.maximum(lo, i + shift - window + 1)
    if docs_ptr is not None:
        first, end = _same_documents(docs_ptr + b * T, i, T, CHUNK)
        lo, hi = tl.maximum(lo, first), tl.minimum(hi, end)
    lo, hi = tl.maximum(lo, 0), tl.minimum(hi, S)
    alive = (lo < hi) & (i < T)
    lo, hi = tl.where(alive, lo, S), tl.where(alive, hi, 0)
    at = ranges_ptr + b * T * 2 + 2 * i
    tl.store(at, lo, i < T)
    tl.store(at + 1, hi, i < T)
    block = blocks_ptr + 2 * (b * tl.num_programs(0) + tl.program_id(0))
    tl.store(block, tl.min(lo, 0))
    tl.store(block + 1, tl.max(hi, 0))
