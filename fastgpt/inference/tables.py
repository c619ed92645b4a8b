"""What the rows of a batch know about each token of the vocabulary: allocated when the first request needs it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgpt.inference.requests import Request


class Tables:
    """Tables of B rows over V tokens on one device, each None until a request needs it.

    A table stays where it is once it is allocated, so a recorded graph may read it.

    Attributes:
        seen: (B, V) bool: the token is in the text, prompt included; for repetition penalties.
        counts: (B, V) int32: how often the token was added; for presence and frequency penalties.
        bias: (B, V) fp32: what is added to the logits.
        allowed: (B, ceil(V / 32)) int32, a bit for each token, lowest first: the grammar allows it.
    """

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        self._shape, self._device = (rows, vocab_size), device
        self.seen: Tensor | None = None
        self.counts: Tensor | None = None
        self.bias: Tensor | None = None
        self.allowed: Tensor | None = None

    def set(self, row: int, request: Request, ids: Sequence[int], new: Sequence[int] = ()) -> None:
        """Set up a row for a request whose text is ids, of which `new` were added to the prompt."""
        if request.repetition_penalty != 1:
            self.seen = self._of(self.seen, torch.bool)
            self.seen[row] = False
            self.seen[row, torch.tensor(ids, device=self._device)] = True
        if request.counts_tokens:
            self.counts = self._of(self.counts, torch.int32)
            at = torch.tensor(new, dtype=torch.int64, device=self._device)
            self.counts[row] = at.bincount(minlength=self._shape[1])
        if request.logit_bias or self.bias is not None:
            self.bias = self._of(self.bias, torch.float32)
            self.bias[row] = 0
        if request.logit_bias and self.bias is not None:
            at = torch.tensor(list(request.logit_bias), device=self._device)
            self.bias[row, at] = torch.tensor(list(request.logit_bias.values()), device=self._device)

    def _of(self, table: Tensor | None, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self._shape, dtype=dtype, device=self._device) if table is None else table

    def move(self, source: int, to: int) -> None:
        """Copy a row over another."""
        for table in (self.seen, self.counts, self.bias):
            if table is not None:
                table[to] = table[source]

    def allow(self, first: int, allowed: Sequence[Tensor | None]) -> None:
        """Set the tokens that the rows from `first` on may take next; None: all."""
        if all(bits is None for bits in allowed):
            return
        words = -(-self._shape[1] // 32)
        if self.allowed is None:
            self.allowed = torch.empty(self._shape[0], words, dtype=torch.int32, device=self._device)
        every = torch.full((words,), -1, dtype=torch.int32)
        self.allowed[first : first + len(allowed)] = torch.stack([every if b is None else b for b in allowed])

    def rows(self, first: int, last: int) -> Tables:
        """Return rows first to last - 1, as views."""
        part = Tables(last - first, self._shape[1], self._device)
        for name in ("seen", "counts", "bias", "allowed"):
            table = getattr(self, name)
            setattr(part, name, None if table is None else table[first:last])
        return part

    def add(self, token: Tensor) -> None:
        """Enter the tokens (B,) int64 that the rows took; -1 counts as 0."""
        index = token.clamp(min=0)[:, None]
        if self.seen is not None:
            self.seen.scatter_(1, index, True)
        if self.counts is not None:
            self.counts.scatter_add_(1, index, torch.ones_like(index, dtype=torch.int32))


def unpack(bits: Tensor, size: int) -> Tensor:
    """Return bits (B, ceil(size / 32)) int32 as (B, size) bool."""
    places = torch.arange(32, dtype=torch.int32, device=bits.device)
    return (bits[:, :, None] >> places & 1).bool().flatten(1)[:, :size]
