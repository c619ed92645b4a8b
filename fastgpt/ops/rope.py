"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

The first rotary_dim columns of each head turn by position: pairs (a, b) become (a cos - b sin, b cos + a sin). Pairs
are (i, i + rotary_dim/2) by default ("half", GPT-NeoX, Llama) or (2i, 2i + 1) ("interleaved", GPT-J).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.backend import checks_values, register, select
from fastgpt.ops._common import check_float

register("rope")


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].to(torch.promote_types(x.dtype, torch.float32)), x[..., 2 * half :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    c, s = cos.to(turned.dtype).unsqueeze(-2), sin.to(turned.dtype).unsqueeze(-2)
    pair = (a * c - b * s, b * c + a * s)
    out = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((out.to(x.dtype), rest), -1) if rest.shape[-1] else out.to(x.dtype)


def _tables(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """cos and sin for x's rows: (T, R/2), or (B, T, R/2) with positions per sequence."""
    t, d = x.shape[1], x.shape[-1]
    if cos.shape != sin.shape or cos.dim() != 2:
        raise ValueError(f"rope: cos {tuple(cos.shape)} and sin {tuple(sin.shape)}, expected both (T, rotary_dim / 2)")
    if 2 * cos.shape[1] > d:
        raise ValueError(f"rope: cos covers {2 * cos.shape[1]} columns, expected at most the head dimension {d}")
    if positions is None:
        if t > cos.shape[0]:
            raise ValueError(f"rope: x has {t} positions, cos and sin only {cos.shape[0]}")
        return cos[:t], sin[:t]
    if positions.shape not in ((t,), (x.shape[0], t)):
        raise ValueError(f"rope: positions has shape {tuple(positions.shape)}, expected ({t},) or ({x.shape[0]}, {t})")
    if checks_values(positions) and not torch.compiler.is_compiling() and positions.numel():
        low, high = (int(v) for v in positions.aminmax())
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(f"rope: positions reach from {low} to {high}, expected 0 to {cos.shape[0] - 1}")
    return cos[positions], sin[positions]


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys.

    Args:
        q: (B, T, H, D); k: (B, T, Hkv, D); any strides.
        cos, sin: (T_max, rotary_dim / 2), fp32.
        positions: (T,) or (B, T) int64 row of cos and sin for each token; default 0, 1, 2, ...

    Returns:
        q and k turned, in their dtypes.

    Raises:
        ValueError, TypeError: naming the argument. Source: arXiv:2104.09864.
    """
    check_float("rope", "q", q)
    check_float("rope", "k", k)
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"rope: q {tuple(q.shape)} and k {tuple(k.shape)}, expected (B, T, H, D) and (B, T, Hkv, D)")
    select("rope", q)
    c, s = _tables(q, cos, sin, positions)
    return _rotate(q, c, s, interleaved), _rotate(k, c, s, interleaved)


def rope_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    n_heads: int,
    n_kv_heads: int,
    interleaved: bool = False,
    positions: Tensor | None = None,
) -> Tensor:
    """Rotate the query and key heads of one packed tensor; the reference returns a new tensor, kernels write in place.

    Args:
        qkv: (B, T, n_heads + 2 n_kv_heads, D): query heads, key heads, value heads. Use only what is returned.

    Returns:
        qkv with its first n_heads + n_kv_heads heads turned.

    Raises:
        ValueError, TypeError: naming the argument. Source: arXiv:2104.09864.
    """
    check_float("rope", "qkv", qkv)
    heads = n_heads + 2 * n_kv_heads
    if qkv.dim() != 4 or qkv.shape[2] != heads:
        raise ValueError(f"rope: qkv has shape {tuple(qkv.shape)}, expected (B, T, {heads}, D)")
    select("rope", qkv)
    c, s = _tables(qkv, cos, sin, positions)
    turned = n_heads + n_kv_heads
    return torch.cat((_rotate(qkv[:, :, :turned], c, s, interleaved), qkv[:, :, turned:]), dim=2)
