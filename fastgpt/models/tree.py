"""Texts that begin alike, as one row of tokens in which every shared part stands once.

A tree of segments: a text is the path from a root to some segment. The segments stand in the row in depth-first order,
so what follows a segment in its subtree is contiguous. A token attends to its own segment up to itself, and to all of
the segments above. For each level of the tree the attention to the segments of that level is one call over packed
sequences, and the parts are put together by their log-sum-exp:

    lse = log(exp(lse_1) + exp(lse_2)),  out = out_1 + sigmoid(lse_2 - lse_1) (out_2 - out_1)

Before the roots there may be a text that was read into a KVCache, which every token sees.

Source: cascade inference (Ye et al. 2025, arXiv:2501.01005), Hydragen (Juravsky et al. 2024, arXiv:2402.05099).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.models.cache import KVCache


class Segment(NamedTuple):
    """A segment of a tree.

    Attributes:
        tokens: number of its tokens, at least 1.
        parent: number of the segment before it on its path; -1: none.
    """

    tokens: int
    parent: int = -1


class TokenTree:
    """Where the tokens of a row stand, and what they see.

    Args:
        segments: in depth-first order, a parent before its children.
        before: a text of one row that was read already; None: none.
        device: of the model.

    Attributes:
        positions: (T,) int64, of the tokens in their texts.
        end: the largest position + 1.
    """

    def __init__(
        self, segments: Sequence[Segment], before: KVCache | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.before, past = before, 0 if before is None else before.length
        starts: list[int] = []  # positions
        ends: list[int] = []
        levels: list[int] = []
        first = [0]  # place in the row
        for s in segments:
            starts.append(past if s.parent < 0 else ends[s.parent])
            ends.append(starts[-1] + s.tokens)
            levels.append(0 if s.parent < 0 else levels[s.parent] + 1)
            first.append(first[-1] + s.tokens)
        last = list(first[1:])  # of the subtree
        for i in range(len(segments) - 1, -1, -1):
            if (parent := segments[i].parent) >= 0:
                last[parent] = max(last[parent], last[i])
        self.end, self.longest = max(ends), max(s.tokens for s in segments)
        parts = [torch.arange(a, b) for a, b in zip(starts, ends)]
        self.positions = torch.cat(parts).to(device)
        self.own = torch.tensor(first, dtype=torch.int32, device=device)
        spans = [
            [(first[i], first[i + 1], last[i]) for i, at in enumerate(levels) if at == n] for n in range(max(levels))
        ]
        self.above = [_level([s for s in level if s[2] > s[1]], first[-1], device) for level in spans]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, **options: Any) -> Tensor:
        """Return what the queries q (1, T, H, D) see in keys and values k and v (1, T, G, D): (1, T, H, D).

        Args:
            window: as in ops.attention; it must reach over each text that has more than one segment.
            options: scale and softcap of ops.attention.
        """
        window = None if window is None or window >= self.longest else window
        own: dict[str, Any] = dict(cu_seqlens_q=self.own, cu_seqlens_k=self.own, causal=True, window=window)
        out, lse = ops.attention(q, k, v, **own, **options, return_lse=True)
        for rows, cu_q, cu_k in self.above:
            cu: dict[str, Any] = dict(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
            _add(out, lse, rows, *ops.attention(q[:, rows], k, v, **cu, **options, return_lse=True))
        if self.before is not None and self.before.length:
            keys, values = (t[layer, :, : self.before.length] for t in (self.before.k, self.before.v))
            _add(out, lse, slice(None), *ops.attention(q, keys, values, **options, return_lse=True))
        return out


class Level(NamedTuple):
    """The attention of a row to the segments of a level.

    Attributes:
        rows: the tokens below these segments.
        cu_seqlens_q, cu_seqlens_k: (n + 1,) int32, of these tokens, and of the keys of the row.
    """

    rows: slice | Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor


def _level(spans: Sequence[tuple[int, int, int]], total: int, device: torch.device | str) -> Level:
    """Return the level in which tokens b to c - 1 of each span (a, b, c) see tokens a to b - 1 of `total`."""
    q, k = [0], [0]
    for a, b, c in spans:  # before each sequence, one without queries over the keys in between
        q += [q[-1], q[-1] + c - b]
        k += [a, b]
    cu = torch.tensor([[*q, q[-1]], [*k, total]], dtype=torch.int32, device=device)
    if len(spans) == 1:
        return Level(slice(*spans[0][1:]), cu[0], cu[1])
    return Level(torch.cat([torch.arange(b, c) for _, b, c in spans]).to(device), cu[0], cu[1])


def _add(out: Tensor, lse: Tensor, rows: slice | Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Add the attention of rows to more keys, (B, n, H, D) and (B, H, n), to out (B, T, H, D) and lse (B, H, T)."""
    old = lse[:, :, rows]
    share = torch.sigmoid(more_lse - old).transpose(1, 2).unsqueeze(-1)  # exp(more_lse) / (exp(old) + exp(more_lse))
    out[:, rows] = torch.lerp(out[:, rows].to(share.dtype), more.to(share.dtype), share).to(out.dtype)
    lse[:, :, rows] = torch.logaddexp(old, more_lse)
