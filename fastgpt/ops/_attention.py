"""Attention in plain PyTorch: the formula that serves as reference, and PyTorch's fused attention.

z = scale * q k^T, softcapped: softcap * tanh(z / softcap); masked entries -inf
out = softmax(z) v, lse = log sum exp(z); a row without any key gives out = 0, lse = -inf
dropout: p_ij of batch b, head h counts as keep / (1 - p), keep from Philox of (j, i, b H + h) (Salmon et al. 2011)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _segments(cu: Tensor, total: int) -> Tensor:
    """Return for each packed row the number of its sequence, (total,), from cu_seqlens (n + 1,), without a sync."""
    rows = torch.arange(total, device=cu.device)
    return torch.searchsorted(cu[1:].contiguous().long(), rows, right=True)


def attention_mask(q: Tensor, k: Tensor, o: dict[str, Any]) -> Tensor | None:
    """Return which keys each query sees: bool (B or 1, 1, T, S), None for all. Positions align at the bottom right."""
    t, s, device = q.shape[1], k.shape[1], q.device
    rows, cols = torch.arange(t, device=device)[:, None], torch.arange(s, device=device)[None]
    if o["cu_seqlens_q"] is not None:
        cu_q, cu_k = o["cu_seqlens_q"].long(), o["cu_seqlens_k"].long()
        seg_q, seg_k = _segments(cu_q, t), _segments(cu_k, s)
        last = cu_q.shape[0] - 2
        in_q, in_k = seg_q.clamp(max=last), seg_k.clamp(max=last)
        rows = rows + (cu_k[1:] - cu_q[1:])[in_q][:, None]  # bottom right of each packed sequence
        mask = ((seg_q[:, None] == seg_k[None]) & (seg_q[:, None] <= last) & (in_k[None] == seg_k[None]))[None]
    else:
        lens = o["kv_lens"]
        end = torch.full((1, 1, 1), s, device=device) if lens is None else lens.long()[:, None, None]
        rows = rows[None] + s - t
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


def _multiply_wide(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of a * b, both factors below 2^32, in int64 without overflow."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def dropout_keep(rng: Tensor, shape: tuple[int, int, int, int], p: float) -> Tensor:
    """Return which scores dropout keeps, bool (B, H, T, S).

    A score is kept if the first word of Philox4x32-7 (counter j, i, b H + h, offset; key seed) is at least p 2^32. rng:
    (seed, offset), int64. Every kernel computes the same bits.
    """
    b, h, t, s = shape
    seed, offset = (int(x) for x in rng.tolist())
    c: list[Tensor] = [
        torch.arange(s, device=rng.device).expand(b * h, t, s),
        torch.arange(t, device=rng.device)[:, None].expand(b * h, t, s),
        torch.arange(b * h, device=rng.device)[:, None, None].expand(b * h, t, s),
        torch.full((1, 1, 1), offset & 0xFFFFFFFF, device=rng.device).expand(b * h, t, s),
    ]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(7):
        (high0, low0), (high2, low2) = _multiply_wide(0xD2511F53, c[0]), _multiply_wide(0xCD9E8D57, c[2])
        c = [high2 ^ c[1] ^ k0, low2, high0 ^ c[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return (c[0] >= int(p * 2**32)).view(b, h, t, s)


def attention_ref(q: Tensor, k: Tensor, v: Tensor, *, rng: Tensor | None = None, **o: Any) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of the formula at the head of this file, in fp32 (fp64 for fp64 input).

    Options as in `attention`. With rng, dropout is drawn as in the kernels, without rng as in PyTorch.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2]
    qh, kh, vh = (x.transpose(1, 2).to(wide) for x in (q, k, v))  # (B, H, T, D)
    kh, vh = kh.repeat_interleave(group, 1), vh.repeat_interleave(group, 1)
    z = qh @ kh.transpose(-1, -2) * (q.shape[-1] ** -0.5 if o["scale"] is None else o["scale"])
    z = o["softcap"] * torch.tanh(z / o["softcap"]) if o["softcap"] > 0 else z
    mask = attention_mask(q, k, o)
    if mask is not None:
        z = z.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(z, -1)
    p = torch.exp(z - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    if o["dropout_p"] > 0 and rng is not None:
        shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        p = p * dropout_keep(rng, shape, o["dropout_p"]) / (1 - o["dropout_p"])
    elif o["dropout_p"] > 0:
        p = F.dropout(p, o["dropout_p"])
    return (p @ vh).transpose(1, 2).to(q.dtype), lse


def sdpa_can(q: Tensor, k: Tensor, o: dict[str, Any], deterministic: bool) -> bool:
    """Return whether PyTorch's fused attention can express this call."""
    special = ("window", "cu_seqlens_q", "doc_ids", "kv_lens", "kv_start")
    if o["return_lse"] or o["softcap"] > 0 or any(o[n] is not None for n in special) or (deterministic and q.is_cuda):
        return False
    return k.shape[1] > 0 and (q.shape[1] == k.shape[1] or not o["causal"])


def attention_torch(q: Tensor, k: Tensor, v: Tensor, o: dict[str, Any], deterministic: bool = False) -> Any:
    """Serve the `torch` backend: PyTorch's fused attention if it can express the call, else the formula."""
    if not sdpa_can(q, k, o, deterministic):
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
