"""How the tensors of a file become one of fastgpt's parameters, and back: pure functions of tensors and shapes.

Shapes: C width, H query heads, G key/value heads, D head, F hidden size of the MLP, V vocabulary, Vp its padded rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgpt.models.config import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A parameter that a file holds as it is, as one tensor.

    modules: names of the file's modules, with {i} for the layer; the parameter's own leaf (weight or bias) is added.
    """

    modules: tuple[str, ...]

    def shapes(self, shape: Shape, c: ModelConfig) -> list[Shape]:
        """Shapes in the file of a parameter of `shape`."""
        return [shape]

    def pack(self, parts: Sequence[Tensor], c: ModelConfig) -> Tensor:
        """Return the parameter from the file's tensors."""
        return parts[0]

    def unpack(self, p: Tensor, c: ModelConfig) -> list[Tensor]:
        """Return the file's tensors from the parameter."""
        return [p]


class Transposed(Layout):
    """GPT-2's Conv1D, which keeps (in, out); the bias is the same."""

    def shapes(self, shape: Shape, c: ModelConfig) -> list[Shape]:
        return [shape[::-1]]

    def pack(self, parts: Sequence[Tensor], c: ModelConfig) -> Tensor:
        return parts[0].t()

    def unpack(self, p: Tensor, c: ModelConfig) -> list[Tensor]:
        return [p.t()]


class Vocabulary(Layout):
    """Rows for the V tokens, zero rows up to Vp behind them here."""

    def shapes(self, shape: Shape, c: ModelConfig) -> list[Shape]:
        return [(c.vocab_size or shape[0], *shape[1:])]

    def pack(self, parts: Sequence[Tensor], c: ModelConfig) -> Tensor:
        rows = parts[0]
        if rows.shape[0] == c.padded_vocab_size:
            return rows
        padded = rows.new_zeros(c.padded_vocab_size, *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        return padded

    def unpack(self, p: Tensor, c: ModelConfig) -> list[Tensor]:
        return [p[: c.vocab_size]]


class Split(Layout):
    """Separate matrices whose rows are one behind the other here: queries, keys, values; or gate, up."""

    def sizes(self, c: ModelConfig) -> list[int]:
        """Rows of each matrix."""
        if len(self.modules) == 2:
            return [c.d_mlp, c.d_mlp]
        return [c.n_heads * c.d_head, c.kv_heads * c.d_head, c.kv_heads * c.d_head]

    def shapes(self, shape: Shape, c: ModelConfig) -> list[Shape]:
        return [(rows, *shape[1:]) for rows in self.sizes(c)]

    def pack(self, parts: Sequence[Tensor], c: ModelConfig) -> Tensor:
        return torch.cat(list(parts))

    def unpack(self, p: Tensor, c: ModelConfig) -> list[Tensor]:
        return list(p.split(self.sizes(c)))


class HalfRotary(Split):
    """As Split, for files whose heads rotate pairs (i, i + D/2); a model that rotates (2i, 2i + 1) is reordered."""

    def unpack(self, p: Tensor, c: ModelConfig) -> list[Tensor]:
        q, k, v = super().unpack(p, c)
        return [half_pairs(q, c), half_pairs(k, c), v] if c.rope_interleaved else [q, k, v]


class HalfRotaryNorm(Layout):
    """Weight (D) of the norm of query or key heads, in the order that HalfRotary gives the heads' columns."""

    def unpack(self, p: Tensor, c: ModelConfig) -> list[Tensor]:
        return [half_pairs(p, c) if c.rope_interleaved else p]


class ByHead(Layout):
    """GPT-NeoX's query_key_value: rows (H, 3, D) in the file, (3, H, D) here."""

    def pack(self, parts: Sequence[Tensor], c: ModelConfig) -> Tensor:
        p = parts[0]
        return p.view(c.n_heads, 3, c.d_head, *p.shape[1:]).transpose(0, 1).reshape(p.shape)

    def unpack(self, p: Tensor, c: ModelConfig) -> list[Tensor]:
        return [p.view(3, c.n_heads, c.d_head, *p.shape[1:]).transpose(0, 1).reshape(p.shape)]


def half_pairs(rows: Tensor, c: ModelConfig) -> Tensor:
    """Reorder the rows of each head (heads x D, ...) from pairs (2i, 2i + 1) to (i, i + D/2)."""
    return rows.view(-1, c.d_head // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def adjacent_pairs(rows: Tensor, c: ModelConfig) -> Tensor:
    """Undo half_pairs: to pairs (2i, 2i + 1), the order of Meta's Llama files and of GGUF's."""
    return rows.view(-1, 2, c.d_head // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
