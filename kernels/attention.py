"""Attention, forward (FlashAttention-2, arXiv:2307.08691), and the launchers of forward and backward.

    z = scale q k^T, softcapped: softcap tanh(z / softcap);  out = softmax(z) v,  lse = log sum exp(z)

Fused: scores, mask, online softmax, dropout, product with v; the T x S matrix is never in memory. A program loads
BLOCK_M queries of one head and loops over the keys that they see (_attention.py). A query without keys gives out = 0
and lse = -inf. Query blocks run from last to first, so the long ones of causal order start first.
Bytes: q, k, v read, out and lse written, k and v read from L2 again for each query block. Saved: q, k, v, out, lse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention import (
    BAND,
    CAUSAL,
    LN2,
    LOG2E,
    NONE,
    ROWS,
    attention_ranges_kernel,
    kept,
    key_blocks,
    load_tile,
    operand,
    power,
    row_range,
    store_tile,
    visible,
)
from ._attention_tiles import CHIPS, CHUNK, DELTA_TILE, RANGE_BLOCK, columns, options_on, shared_memory, tile, tiled
from ._math import tanh
from ._runtime import Configuration, dot, interpreted, jit_kernel, log, on_device, pointers
from .attention_bwd import attention_delta_kernel, attention_dkdv_kernel, attention_dq_kernel


# fmt: off
@triton.jit
def _fwd_blocks(
    acc, top, total, q, k_ptr, v_ptr, k_row, v_row, start, stop, low, high, rows, lo, hi, docs_ptr, rng_ptr, head,
    scale, cap, threshold, T, RANGE: tl.constexpr, DOCS: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):
    """Add the keys from start to stop by online softmax. acc: (M, BLOCK_D); top, total: (M)."""
    dtype: tl.constexpr = v_ptr.dtype.element_ty
    doc_q = tl.load(docs_ptr + tl.minimum(rows, T - 1))[:, None] if DOCS else None
    for n in tl.range(start, stop, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        inside = (cols >= low) & (cols < high) if MASKED else None
        k = load_tile(k_ptr, n, k_row, inside, BLOCK_N, D, BLOCK_D)
        z = dot(q, tl.trans(k))  # (M, N)
        if SOFTCAP:
            z = cap * tanh(z * scale)
        elif MASKED:
            z = z * scale
        if MASKED:
            doc_k = tl.load(docs_ptr + cols, inside, other=0)[None, :] if DOCS else None
            z = tl.where(visible(cols[None, :], lo[:, None], hi[:, None], doc_q, doc_k, RANGE), z, -float("inf"))
        if SOFTCAP or MASKED:
            peak = tl.maximum(top, tl.max(z, 1))
            base = tl.where(peak == -float("inf"), 0.0, peak)  # no key seen yet: the power of -inf - 0 is 0
            p = power(z - base[:, None], dtype)
        else:  # scale >= 0 saves one multiplication per element
            peak = tl.maximum(top, tl.max(z, 1) * scale)
            base = peak
            p = power(z * scale - base[:, None], dtype)
        shrink = power(top - base, dtype)
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(kept(rng_ptr, rows[:, None], cols[None, :], head, threshold), p, 0.0)
        v = load_tile(v_ptr, n, v_row, inside, BLOCK_N, D, BLOCK_D)
        acc = acc * shrink[:, None] + dot(operand(p, dtype), v)
        top = peak
    return acc, top, total


@jit_kernel(do_not_specialize=["H", "G", "T", "S", "back", "ahead", "threshold"])
def attention_fwd_kernel(
    q_ptr,  # (B, T, H, D)
    k_ptr,  # (B, S, H / G, D)
    v_ptr,  # (B, S, H / G, D)
    out_ptr,  # (B, T, H, D) contiguous
    lse_ptr,  # (B, H, T)
    ranges_ptr,  # (B, T, 2), ROWS only
    docs_ptr,  # (B, T) or None
    rng_ptr,  # (2): seed and offset, or None
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, H, G, T, S, back, ahead,
    scale, cap, threshold, keep_scale, RANGE: tl.constexpr, DOCS: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Compute BLOCK_M queries of one head per program.

    scale: of the scores, in the base of `power`; with SOFTCAP, scale / softcap. cap: softcap, in the base of `power`.
    """
    blocks = tl.cdiv(T, BLOCK_M)
    start = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    head = tl.program_id(0) // blocks  # among B H
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q_ptr += b * q_batch + h * q_head
    k_ptr += b * k_batch + h // G * k_head
    v_ptr += b * v_batch + h // G * v_head
    if RANGE == ROWS:
        ranges_ptr += b * T * 2
    if DOCS:
        docs_ptr += b * T
    WHOLE: tl.constexpr = not (DOCS or SOFTCAP or DROPOUT)  # compared with these, a mask costs nothing
    rows = start + tl.arange(0, BLOCK_M)
    q = load_tile(q_ptr, start, q_row, rows < T, BLOCK_M, D, BLOCK_D)
    q = operand(tl.where(scale < 0, -1.0, 1.0) * q.to(tl.float32), q_ptr.dtype.element_ty)
    scale = tl.abs(scale)
    lo, hi = row_range(rows, ranges_ptr, T, S, back, ahead, RANGE)
    first, left, right, last, low = key_blocks(lo, hi, start, T, S, back, ahead, RANGE, WHOLE, BLOCK_M, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top, total = tl.full([BLOCK_M], -float("inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    if (RANGE == BAND or RANGE == ROWS) and WHOLE:
        acc, top, total = _fwd_blocks(
            acc, top, total, q, k_ptr, v_ptr, k_row, v_row, first, left, low, last, rows, lo, hi, docs_ptr, rng_ptr,
            head, scale, cap, threshold, T, RANGE, DOCS, SOFTCAP, DROPOUT, D, BLOCK_D, BLOCK_N, True)
    if WHOLE:
        acc, top, total = _fwd_blocks(
            acc, top, total, q, k_ptr, v_ptr, k_row, v_row, left, right, low, last, rows, lo, hi, docs_ptr, rng_ptr,
            head, scale, cap, threshold, T, RANGE, DOCS, SOFTCAP, DROPOUT, D, BLOCK_D, BLOCK_N, False)
    acc, top, total = _fwd_blocks(
        acc, top, total, q, k_ptr, v_ptr, k_row, v_row, right, last, low, last, rows, lo, hi, docs_ptr, rng_ptr, head,
        scale, cap, threshold, T, RANGE, DOCS, SOFTCAP, DROPOUT, D, BLOCK_D, BLOCK_N, True)
    seen = total != 0.0
    out = acc / tl.where(seen, total, 1.0)[:, None] * keep_scale  # a product with 1 / total would round twice
    store_tile(out_ptr + (b * T * H + h) * D, out, start, H * D, T, BLOCK_M, D, BLOCK_D)
    if q_ptr.dtype.element_ty != tl.float32:
        top *= LN2
    lse = tl.where(seen, top + log(tl.where(seen, total, 1.0)), -float("inf"))
    tl.store(lse_ptr + tl.cast(head, tl.int64) * T + rows, lse, rows < T)
# fmt: on


def _ranges(q: Tensor, k: Tensor, index: tuple[Tensor | None, ...], causal: bool, window: int) -> dict[str, Any]:
    """Return the arguments that say which keys queries see: numbers, or ranges computed on the device."""
    (B, T), S = q.shape[:2], k.shape[1]
    window = 0 if window >= S else window
    back, ahead = S - T - window + 1, S - T + 1 if causal else S
    found: dict[str, Any] = {"RANGE": NONE.value, "back": back, "ahead": ahead, "ranges_ptr": None, "docs_ptr": None}
    found |= {"blocks_ptr": None, "blocks": 0, "DOCS": False}
    if all(t is None for t in index):
        return found | {"RANGE": BAND.value if window else CAUSAL.value if causal else NONE.value}
    cu_q, cu_k, docs, kv_lens, kv_start = (None if t is None else t.contiguous() for t in index)
    blocks = triton.cdiv(T, RANGE_BLOCK)
    ranges = torch.empty((B, T, 2), dtype=torch.int32, device=q.device)
    of_blocks = torch.empty((B, blocks, 2), dtype=torch.int32, device=q.device)
    n = 0 if cu_q is None else cu_q.shape[0] - 1
    numbers = (n, n.bit_length(), T, S, int(causal), window)
    attention_ranges_kernel[(blocks, B)](
        cu_q, cu_k, docs, kv_lens, kv_start, ranges, of_blocks, *numbers, BLOCK=RANGE_BLOCK, CHUNK=CHUNK, num_warps=4
    )
    found |= {"RANGE": ROWS.value, "ranges_ptr": ranges, "blocks_ptr": of_blocks, "blocks": blocks}
    return found | {"docs_ptr": docs, "DOCS": docs is not None}


def _scores(q: Tensor, k: Tensor, rng: Tensor | None, scale: float, softcap: float, dropout_p: float) -> dict[str, Any]:
    """Return the arguments of the kernels for scale, softcap, dropout and sizes."""
    base = 1.0 if q.dtype == torch.float32 else LOG2E.value  # the base of `power`
    inner = scale / softcap if softcap > 0 else scale * base
    dropout = {"rng_ptr": rng, "threshold": int(dropout_p * 2**32), "keep_scale": 1.0 / (1.0 - dropout_p)}
    sizes = {"H": q.shape[2], "G": q.shape[2] // k.shape[2], "T": q.shape[1], "S": k.shape[1]}
    columns_ = {"D": q.shape[3], "BLOCK_D": columns(q.shape[3])}
    flags = {"SOFTCAP": softcap > 0, "DROPOUT": dropout_p > 0}
    return {"scale": inner, "cap": softcap * base, **dropout, **sizes, **columns_, **flags}


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, doc_ids: Tensor | None,
    kv_lens: Tensor | None, kv_start: Tensor | None, rng: Tensor | None, causal: bool, scale: float, window: int,
    softcap: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return out (B, T, H, D), contiguous, and lse (B, H, T)."""
    (B, T, H, width), device = q.shape, q.device
    q, k, v = tiled(q), tiled(k), tiled(v)
    D = q.shape[3]
    out, lse = torch.empty((B, T, H, D), dtype=q.dtype, device=device), torch.empty((B, H, T), device=device)
    if out.numel() == 0:
        return out[..., :width], lse
    with on_device(q):
        options = _ranges(q, k, (cu_seqlens_q, cu_seqlens_k, doc_ids, kv_lens, kv_start), causal, window)
        del options["blocks_ptr"], options["blocks"]
        options |= _scores(q, k, rng, scale, softcap, dropout_p)
        shape = tile("fwd", D, q.dtype, options_on(options), shared_memory(device))
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        names = ("q_batch", "q_row", "q_head", "k_batch", "k_row", "k_head", "v_batch", "v_row", "v_head")
        grid = (triton.cdiv(T, shape["BLOCK_M"]) * B * H,)
        attention_fwd_kernel[grid](q, k, v, out, lse, **dict(zip(names, strides)), **options, **shape)
    return out if D == width else out[..., :width].contiguous(), lse


def _backward(grads: tuple[Tensor, ...], dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
              out: Tensor, lse: Tensor, *o: Any) -> None:  # fmt: skip
    """Fill dq, dk and dv; dk and dv have the same layout."""
    (B, T, H, width), (S, heads), device = q.shape, k.shape[1:3], q.device
    if q.numel() == 0 or S == 0:
        for t in grads:
            t.zero_()
        return
    q, k, v, dout, out, lse = tiled(q), tiled(k), tiled(v), tiled(dout), tiled(out), lse.contiguous()
    D = q.shape[3]
    dq, dk, dv = grads if D == width else (torch.empty((*t.shape[:3], D), dtype=t.dtype, device=device) for t in grads)
    delta = torch.empty_like(lse)
    with on_device(q):
        options = _ranges(q, k, o[:5], o[6], o[8]) | _scores(q, k, o[5], o[7], o[9], o[10])
        blocks = {"blocks_ptr": options.pop("blocks_ptr"), "blocks": options.pop("blocks")}
        rows = 1024 if interpreted() else DELTA_TILE // columns(D)
        attention_delta_kernel[(triton.cdiv(B * T * H, rows),)](
            out, dout, lse, None if dlse is None else dlse.contiguous(), delta, *out.stride()[:3], *dout.stride()[:3],
            H, T, B * T * H, D, columns(D), rows, num_warps=4)  # fmt: skip
        strides = (t.stride(i) for t in (q, k, v, dout) for i in range(3))
        names = (f"{t}_{of}" for t in ("q", "k", "v", "dout") for of in ("batch", "row", "head"))
        options |= {**dict(zip(names, strides)), "factor": o[7]}
        on, kb = options_on(options), shared_memory(device)
        shape = tile("dkdv", D, q.dtype, on, kb)
        attention_dkdv_kernel[(triton.cdiv(S, shape["BLOCK_N"]) * B * heads,)](
            q, k, v, dout, lse, delta, dk, dv, dk_batch=dk.stride(0), dk_row=dk.stride(1), dk_head=dk.stride(2),
            **options, **blocks, BLOCK=RANGE_BLOCK, CHUNK=CHUNK, **shape)  # fmt: skip
        shape = tile("dq", D, q.dtype, on, kb)
        attention_dq_kernel[(triton.cdiv(T, shape["BLOCK_M"]) * B * H,)](
            q, k, v, dout, lse, delta, dq, dq_batch=dq.stride(0), dq_row=dq.stride(1), dq_head=dq.stride(2),
            **options, **shape)  # fmt: skip
    if D != width:
        for t, wide in zip(grads, (dq, dk, dv)):
            t.copy_(wide[..., :width])


def attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv, contiguous."""
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    _backward((dq, dk, dv), dout, dlse, q, k, v, out, lse, *options)
    return dq, dk, dv


def attention_qkv_bwd(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *options: Any) -> Tensor:
    """Return dqkv, contiguous; the kernels write into its three parts."""
    *options, n_heads, n_kv_heads = options  # type: ignore[assignment]
    sizes = [n_heads, n_kv_heads, n_kv_heads]
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    _backward(dqkv.split(sizes, 2), dout, None, *qkv.split(sizes, 2), out, lse, *options)  # type: ignore[arg-type]
    return dqkv


# options of a launch: each alone, and all of them, which need most registers
CASES: dict[str, dict[str, Any]] = {
    "causal": {"RANGE": CAUSAL.value},
    "full": {"RANGE": NONE.value},
    "window": {"RANGE": BAND.value},
    "ranges": {"RANGE": ROWS.value},
    "documents": {"RANGE": ROWS.value, "DOCS": True},
    "softcap": {"RANGE": CAUSAL.value, "SOFTCAP": True},
    "dropout": {"RANGE": CAUSAL.value, "DROPOUT": True},
    "window softcap dropout": {"RANGE": BAND.value, "SOFTCAP": True, "DROPOUT": True},
    "all": {"RANGE": ROWS.value, "DOCS": True, "SOFTCAP": True, "DROPOUT": True},
}


def _configuration(kernel: Any, which: str, D: int, dtype: torch.dtype, case: str, kb: int) -> Configuration:
    o: dict[str, Any] = {"DOCS": False, "SOFTCAP": False, "DROPOUT": False, **CASES[case]}
    shape = tile(which, D, dtype, options_on(o), kb)
    launch = {n: shape[n] for n in ("num_warps", "num_stages", "maxnreg") if n in shape}
    constexprs = {**o, "D": D, "BLOCK_D": columns(D), "BLOCK_M": shape["BLOCK_M"], "BLOCK_N": shape["BLOCK_N"]}
    f32, i32, rows, names = torch.float32, torch.int32, o["RANGE"] == ROWS.value, kernel.arg_names
    constexprs |= {"BLOCK": RANGE_BLOCK, "CHUNK": CHUNK} if "CHUNK" in names else {}
    index = pointers(ranges_ptr=i32 if rows else None, blocks_ptr=i32 if rows else None)
    index |= pointers(docs_ptr=i32 if o["DOCS"] else None, rng_ptr=torch.int64 if o["DROPOUT"] else None)
    types = {**pointers(lse_ptr=f32, delta_ptr=f32), **index}
    floats = ("scale", "cap", "keep_scale", "factor")
    pointer = pointers(x=dtype)["x"]
    plain = {n: pointer if n.endswith("_ptr") else "fp32" if n in floats else "i32" for n in names}
    arguments = {n: types.get(n, plain[n]) for n in names if n not in constexprs}
    quick = D in (64, 128) and case in ("causal", "all")
    return Configuration(
        kernel, f"D={D} {case}", arguments, constexprs=constexprs, archs=CHIPS[kb], quick=quick, **launch
    )


def _small_configurations(dtype: torch.dtype) -> Iterator[Configuration]:
    """Yield the launch shapes of the two small kernels: delta, and the ranges of queries."""
    f32, i32 = torch.float32, torch.int32
    sizes = dict.fromkeys(
        ("out_batch", "out_row", "out_head", "dout_batch", "dout_row", "dout_head", "H", "T", "N"), "i32"
    )
    numbers = dict.fromkeys(("n", "steps", "T", "S", "causal", "window"), "i32")
    for full in (False, True):
        case, index = "full" if full else "plain", i32 if full else None
        delta = pointers(out_ptr=dtype, dout_ptr=dtype, lse_ptr=f32, dlse_ptr=f32 if full else None, delta_ptr=f32)
        for D in (64, 128, 256):
            meta = {"D": D, "BLOCK_D": D, "BLOCK": DELTA_TILE // D}
            yield Configuration(attention_delta_kernel, f"D={D} {case}", {**delta, **sizes}, 4, meta, quick=D == 64)
        for packed in (False, True):
            cu, lens = (index, None) if packed else (None, index)
            ranges = pointers(cu_q_ptr=cu, cu_k_ptr=cu, docs_ptr=lens, kv_lens_ptr=lens, kv_start_ptr=lens)
            ranges |= {**pointers(ranges_ptr=i32, blocks_ptr=i32), **numbers}
            meta = {"BLOCK": RANGE_BLOCK, "CHUNK": CHUNK}
            name = f"{'packed' if packed else 'batch'} {case}"
            yield Configuration(attention_ranges_kernel, name, ranges, 4, meta, quick=full)


def configurations(dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Iterator[Configuration]:
    """Yield every launch shape by head dimension, chip and options; head dimensions in between are padded."""
    if weight_dtype not in (None, dtype):
        return
    kernels = {"fwd": attention_fwd_kernel, "dkdv": attention_dkdv_kernel, "dq": attention_dq_kernel}
    yield from _small_configurations(dtype)
    for kb in CHIPS:
        for D in (64, 128, 256):
            for case in CASES:
                for which, kernel in kernels.items():
                    yield _configuration(kernel, which, D, dtype, case, kb)
        for D in (16, 40, 80, 96):
            for which, kernel in kernels.items():
                yield _configuration(kernel, which, D, dtype, "causal", kb)
