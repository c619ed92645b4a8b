"""Keys and values of the tokens that a model has read, so that generating the next token reads only that token.

Memory is allocated once, 2 L B size G D elements. Rows of a batch may have different lengths: the tokens of a row are
in its first slots, and what follows is not read. So positions are slot numbers, and no row contains padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.models.config import ModelConfig


class KVCache:
    """Keys and values k and v (L, B, size, G, D) of the positions seen so far.

    Without `lens`, all rows have `length` tokens, and a pass of T tokens appends T slots to every row. With `lens`, row
    b has lens[b] tokens, and a pass of one token per row writes slot lens[b]; the caller then increases lens. Such a
    pass has the same shapes whatever the lengths are, so it can be recorded in a CUDA graph.

    Args:
        config: shape of the model.
        batch: rows B.
        size: slots of a row, one for each token.
        like: tensor whose device and dtype the cache gets.
    """

    def __init__(self, config: ModelConfig, batch: int, size: int, like: Tensor) -> None:
        shape = (config.n_layers, batch, size, config.kv_heads, config.d_head)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)
        self.size, self.length = size, 0
        self.lens: Tensor | None = None  # (B,) int64
        self._rows: Tensor | None = None  # (B,) int64, 0 to B - 1, with lens
        self._spans: dict[int | None, tuple[Tensor | None, Tensor]] = {}  # of the current pass, by window

    def part(self, first: int, last: int, lens: Tensor | None = None) -> KVCache:
        """Return rows first to last - 1 as a cache that shares this memory: empty, or with `lens` (B,) int64 tokens in
        its rows."""
        part = object.__new__(KVCache)
        part.k, part.v = self.k[:, first:last], self.v[:, first:last]
        part.size, part.length, part.lens, part._spans = self.size, 0, lens, {}
        part._rows = None if lens is None else torch.arange(last - first, device=lens.device)
        return part

    def move(self, source: int, to: int, length: int) -> None:
        """Copy the first `length` slots of one row to another row."""
        for t in (self.k, self.v):
            t[:, to, :length] = t[:, source, :length]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values of a pass, k and v (B, T, G, D), and return all of them, (B, S, G, D). A pass
        updates `length` at its end."""
        if self.lens is not None:
            assert self._rows is not None
            self.k[layer].index_put_((self._rows, self.lens), k[:, 0])
            self.v[layer].index_put_((self._rows, self.lens), v[:, 0])
            return self.k[layer], self.v[layer]
        end = self.length + k.shape[1]
        self.k[layer, :, self.length : end] = k
        self.v[layer, :, self.length : end] = v
        return self.k[layer, :, :end], self.v[layer, :, :end]

    def span(self, window: int | None) -> tuple[Tensor | None, Tensor]:
        """Return the first slot that the query at slot lens sees (None is 0) and the one after the last, (B,) int32."""
        assert self.lens is not None
        if window not in self._spans:
            end = (self.lens + 1).int()
            self._spans[window] = (None if window is None else (end - window).clamp(min=0)), end
        return self._spans[window]
