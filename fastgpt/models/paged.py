"""Keys and values in pages, for texts of any lengths that come and go, and that share what they begin with.

A page has the keys and values of `page_size` tokens that follow one another, in all layers. The pages of a text are
anywhere in memory, in the order of a list; texts that begin alike may have the same first pages. Two passes use them:
`Reading` reads several tokens of some texts, which are packed into one row, and `Stepping` reads a token of each row of
a batch. Who owns which page is up to the caller (fastgpt/inference/pages.py).

Source: PagedAttention (Kwon et al. 2023, arXiv:2309.06180).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.models.config import ModelConfig


class PagedCache:
    """Pages k and v (L, n_pages, page_size, G, D).

    Args:
        config: shape of the model.
        n_pages: number of pages.
        page_size: tokens of a page.
        like: tensor whose device and dtype the cache gets.
    """

    def __init__(self, config: ModelConfig, n_pages: int, page_size: int, like: Tensor) -> None:
        shape = (config.n_layers, n_pages, page_size, config.kv_heads, config.d_head)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)
        self.n_pages, self.page_size = n_pages, page_size

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Write keys and values (N, G, D) to slots (N,) int64, which count through all pages."""
        for pages, new in ((self.k, k), (self.v, v)):
            pages[layer].flatten(0, 1).index_put_((slots,), new)


class Span(NamedTuple):
    """Tokens of a text that a pass reads.

    Attributes:
        tokens: how many.
        before: tokens of the text that were read already.
        pages: of the text; they have room for all of these tokens.
    """

    tokens: int
    before: int
    pages: Sequence[int]


class Reading:
    """The cache of a pass that reads spans of texts, packed into a row (1, T). A token sees its text up to itself."""

    def __init__(self, cache: PagedCache, spans: Sequence[Span]) -> None:
        self.cache, size, device = cache, cache.page_size, cache.k.device
        written, seen = [], []
        for s in spans:
            end = s.before + s.tokens
            slots = (torch.tensor(s.pages)[:, None] * size + torch.arange(size)).flatten()[:end]
            written.append(slots[s.before :])
            seen.append(slots)
        self.written = torch.cat(written).to(device)
        places = [torch.arange(s.before, s.before + s.tokens) for s in spans]
        self.at = torch.cat(places)[None].to(device)
        self.past = any(s.before for s in spans)
        self.seen = torch.cat(seen).to(device) if self.past else None
        self.equal = len(spans) if not self.past and len({s.tokens for s in spans}) == 1 else 0
        self.cu_q = self.cu_k = None
        if len(spans) > 1 and not self.equal:
            self.cu_q = _starts([s.tokens for s in spans], device)
            self.cu_k = _starts([s.before + s.tokens for s in spans], device)

    def positions(self, ids: Tensor, limit: int) -> Tensor:
        if ids.shape != self.at.shape:
            raise ValueError(f"GPT: ids has shape {tuple(ids.shape)}, expected {tuple(self.at.shape)}")
        return self.at

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, **options: Any) -> Tensor:
        """As in Cache."""
        self.cache.write(layer, self.written, k[0], v[0])
        if self.seen is not None:
            k, v = (t[layer].flatten(0, 1).index_select(0, self.seen)[None] for t in (self.cache.k, self.cache.v))
        if self.equal > 1:  # texts of equal length are rows of a batch, which more kernels can serve
            q, k, v = (t.unflatten(1, (self.equal, -1))[0] for t in (q, k, v))
        window = None if window is None or window >= k.shape[1] else window
        options = dict(causal=True, window=window, cu_seqlens_q=self.cu_q, cu_seqlens_k=self.cu_k) | options
        out: Tensor = ops.attention(q, k, v, **options)
        return out.flatten(0, 1)[None] if self.equal > 1 else out

    def advance(self, tokens: int) -> None:
        pass


class Stepping:
    """The cache of a pass that reads one token in each row, whose shapes do not depend on the lengths of the rows.

    Args:
        pages: (B, most) int32, of each row; those after its last one are any.
        lens: (B,) int64, tokens of each row that were read already.
    """

    def __init__(self, cache: PagedCache, pages: Tensor, lens: Tensor) -> None:
        self.cache, self.pages, self.lens = cache, pages, lens
        size = cache.page_size
        page = pages.gather(1, torch.div(lens, size, rounding_mode="floor")[:, None])[:, 0]
        self.written = page.long() * size + lens % size
        self.end = (lens + 1).int()
        self._starts: dict[int, Tensor] = {}  # by window

    def positions(self, ids: Tensor, limit: int) -> Tensor:
        """As in Cache; lengths are on the device, so their values are the caller's responsibility."""
        if ids.shape[1] != 1:
            raise ValueError(f"GPT: ids has shape {tuple(ids.shape)}, expected (B, 1) in a step")
        return self.lens[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, **options: Any) -> Tensor:
        """As in Cache, without dropout and gradients."""
        self.cache.write(layer, self.written, k[:, 0], v[:, 0])
        if window is not None and window not in self._starts:
            self._starts[window] = (self.end - window).clamp(min=0)
        start = None if window is None else self._starts[window]
        del options["dropout_p"]
        k, v = self.cache.k[layer], self.cache.v[layer]
        return ops.attention_decode(q, k, v, self.end, pages=self.pages, kv_start=start, **options)

    def advance(self, tokens: int) -> None:
        pass


def _starts(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Return 0 and the sums of the first 1, 2, ... sizes, int32."""
    return torch.tensor([0, *sizes]).cumsum(0).int().to(device)
