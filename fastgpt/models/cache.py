"""Keys and values of the tokens that a model has read, so that generating the next token reads only that token.

`KVCache` holds rows of equal length, one after the other in memory. `paged.py` has the cache of texts of any lengths,
which come and go.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.models.config import ModelConfig


class Cache(Protocol):
    """What a pass of the model needs of a cache."""

    def positions(self, ids: Tensor, limit: int) -> Tensor | None:
        """Return the positions of ids (B, T), or None for 0, 1, 2, ...; the model has `limit` positions.

        Raises:
            ValueError: ids do not fit.
        """

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, **options: Any) -> Tensor:
        """Keep the keys and values k and v (B, T, G, D) of a layer, and return what the queries q (B, T, H, D) see in
        all of those that are kept: (B, T, H, D).

        Args:
            window: as in ops.attention.
            options: scale, softcap and dropout_p of ops.attention.
        """

    def advance(self, tokens: int) -> None:
        """End a pass of `tokens` tokens in each row."""


class KVCache:
    """Keys and values k and v (L, B, size, G, D) of the first `length` positions of every row.

    Memory is allocated once, 2 L B size G D elements.

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

    def positions(self, ids: Tensor, limit: int) -> Tensor | None:
        t, past, room = ids.shape[1], self.length, min(limit, self.size)
        if past + t > room:
            raise ValueError(f"GPT: ids reach position {past + t}, expected at most {room} (block_size or kv_cache)")
        return torch.arange(past, past + t, device=ids.device) if past else None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, **options: Any) -> Tensor:
        t, end = k.shape[1], self.length + k.shape[1]
        self.k[layer, :, self.length : end] = k
        self.v[layer, :, self.length : end] = v
        k, v = self.k[layer, :, :end], self.v[layer, :, :end]
        if window is not None and t == 1:  # one query sees the last keys, so no mask is needed
            k, v = k[:, -window:], v[:, -window:]
        window = None if window is None or window >= k.shape[1] else window
        out: Tensor = ops.attention(q, k, v, causal=t > 1, window=window, **options)
        return out

    def advance(self, tokens: int) -> None:
        self.length += tokens
