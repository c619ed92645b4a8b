"""Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762) with grouped heads, masks and softcap.

z = scale * q k^T, softcapped: softcap * tanh(z / softcap); masked entries -inf
out = softmax(z) v, lse = log sum exp(z); a row without any key gives out = 0, lse = -inf
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.backend import register, select
from fastgpt.ops._common import autocast, check_float, check_like

register("attention")


def _segments(cu: Tensor, total: int) -> Tensor:
    """cu_seqlens (n + 1,) -> (total,) number of the sequence each packed row belongs to; no sync."""
    rows = torch.arange(total, device=cu.device)
    return torch.searchsorted(cu[1:].contiguous().long(), rows, right=True)


def _mask(q: Tensor, k: Tensor, o: dict[str, Any]) -> Tensor | None:
    """Which keys each query sees: bool (B or 1, 1, T, S), or None for all. Positions align at the bottom right."""
    t, s, device = q.shape[1], k.shape[1], q.device
    rows, cols = torch.arange(t, device=device)[:, None], torch.arange(s, device=device)[None]
    if o["cu_seqlens_q"] is not None:
        cu_q, cu_k = o["cu_seqlens_q"].long(), o["cu_seqlens_k"].long()
        seg_q, seg_k = _segments(cu_q, t), _segments(cu_k, s)
        last = cu_q.shape[0] - 2
        in_q, in_k = seg_q.clamp(max=last), seg_k.clamp(max=last)
        shift = (cu_k[1:] - cu_q[1:])[in_q]
        rows = rows + shift[:, None]  # bottom right of each packed sequence
        mask = ((seg_q[:, None] == seg_k[None]) & (seg_q[:, None] <= last) & (in_k[None] == seg_k[None]))[None]
    else:
        lens = o["kv_lens"]
        end = torch.full((1, 1, 1), s, device=device) if lens is None else lens.long()[:, None, None]
        rows = rows[None] + end - t
        mask = cols[None] < end
        if o["kv_start"] is not None:
            mask = mask & (cols[None] >= o["kv_start"].long()[:, None, None])
        if o["doc_ids"] is not None:
            mask = mask & (o["doc_ids"][:, :, None] == o["doc_ids"][:, None, :])
        mask = mask.expand(-1, t, -1) if mask.shape[1] == 1 else mask
    rows = rows if rows.dim() == 3 else rows[None]
    if o["causal"]:
        mask = mask & (cols[None] <= rows)
    if o["window"] is not None:
        mask = mask & (cols[None] > rows - o["window"])
    plain = not (o["causal"] or o["window"]) and all(
        o[n] is None for n in ("cu_seqlens_q", "kv_lens", "kv_start", "doc_ids")
    )
    return None if plain else mask[:, None]


def attention_ref(q: Tensor, k: Tensor, v: Tensor, **o: Any) -> tuple[Tensor, Tensor]:
    """The formula at this file's head in fp32 (fp64 for fp64 input): (out, lse). Options as in `attention`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2]
    qh, kh, vh = (x.transpose(1, 2).to(wide) for x in (q, k, v))  # (B, H, T, D)
    kh, vh = kh.repeat_interleave(group, 1), vh.repeat_interleave(group, 1)
    z = qh @ kh.transpose(-1, -2) * (q.shape[-1] ** -0.5 if o["scale"] is None else o["scale"])
    z = o["softcap"] * torch.tanh(z / o["softcap"]) if o["softcap"] > 0 else z
    mask = _mask(q, k, o)
    if mask is not None:
        z = z.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(z, -1)
    p = torch.exp(z - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    p = F.dropout(p, o["dropout_p"]) if o["dropout_p"] > 0 else p
    return (p @ vh).transpose(1, 2).to(q.dtype), lse


def attention_torch(q: Tensor, k: Tensor, v: Tensor, o: dict[str, Any]) -> Any:
    """The `torch` backend: PyTorch's fused attention for what it can express, else the formula."""
    special = ("window", "cu_seqlens_q", "doc_ids", "kv_lens", "kv_start")
    square = q.shape[1] == k.shape[1] or not o["causal"]
    if o["return_lse"] or o["softcap"] > 0 or any(o[n] is not None for n in special) or not square or k.shape[1] == 0:
        out, lse = attention_ref(q, k, v, **o)
        return (out, lse) if o["return_lse"] else out
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        dropout_p=o["dropout_p"],
        is_causal=o["causal"],
        scale=o["scale"],
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor, o: dict[str, Any]) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_float("attention", name, x)
        if x.dim() != 4:
            raise ValueError(f"attention: {name} has shape {tuple(x.shape)}, expected (B, T, H, D)")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"attention: k has shape {tuple(k.shape)}, expected ({q.shape[0]}, S, Hkv, {q.shape[3]}) as q")
    check_like("attention", "k", k, tuple(k.shape), q, (q.dtype,), "as q")
    check_like("attention", "v", v, tuple(k.shape), q, (q.dtype,), "as k")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: q has {q.shape[2]} heads, expected a multiple of k's {k.shape[2]}")
    if (o["cu_seqlens_q"] is None) != (o["cu_seqlens_k"] is None):
        raise ValueError("attention: cu_seqlens_q and cu_seqlens_k: one came alone, expected both or neither")
    if o["cu_seqlens_q"] is not None and q.shape[0] != 1:
        raise ValueError(f"attention: cu_seqlens came with a batch of {q.shape[0]}, expected packed (1, total, H, D)")
    if o["window"] is not None and o["window"] < 1:
        raise ValueError(f"attention: window is {o['window']}, expected at least 1 key (the query's own)")
    if o["doc_ids"] is not None and (o["doc_ids"].shape != q.shape[:2] or q.shape[1] != k.shape[1]):
        raise ValueError(f"attention: doc_ids has shape {tuple(o['doc_ids'].shape)}, expected {tuple(q.shape[:2])}")
    if not 0.0 <= o["dropout_p"] < 1.0:
        raise ValueError(f"attention: dropout_p is {o['dropout_p']}, expected 0 to less than 1")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    doc_ids: Tensor | None = None,
    kv_lens: Tensor | None = None,
    kv_start: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Any:
    """softmax(scale q k^T + mask) v.

    Args:
        q: (B, T, H, D); k, v: (B, S, Hkv, D), Hkv dividing H; any strides; one dtype.
        causal: query i sees keys up to i + S - T (aligned at the bottom right).
        scale: default 1 / sqrt(D). window: keys seen back from the query, its own included. softcap: 0 is off.
        cu_seqlens_q, cu_seqlens_k: (n + 1,) int32 starts of packed sequences; then B = 1 and T, S are totals.
        doc_ids: (B, T) int: a query sees keys of its own document only.
        kv_lens, kv_start: (B,) end and start of the valid keys of each sequence.
        deterministic: forbids dispatch to a library whose backward is not; fastgpt's own always is.
        return_lse: also return log-sum-exp (B, H, T), fp32.

    Returns:
        (B, T, H, D) in q's dtype; a query without any key gives 0 (and lse -inf).

    Raises:
        ValueError, TypeError: naming the argument. Source: arXiv:1706.03762, FlashAttention-2 arXiv:2307.08691.
    """
    options: dict[str, Any] = dict(
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        dropout_p=dropout_p,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        doc_ids=doc_ids,
        kv_lens=kv_lens,
        kv_start=kv_start,
        return_lse=return_lse,
    )
    if all(isinstance(t, Tensor) and t.is_floating_point() for t in (q, k, v)):
        q, k, v = (t for t in autocast(q, k, v) if t is not None)
    _check(q, k, v, options)
    select("attention", q)
    return attention_torch(q, k, v, options)
