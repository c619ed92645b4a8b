"""A batch of token sequences, as loaders return it and tasks take it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Batch(NamedTuple):
    """Rows of tokens on one device; a row may hold several documents.

    Attributes:
        ids: (B, T) int64.
        targets: (B, T) int64, the token after each of ids; IGNORE does not count.
        doc_ids: (B, T) int32, the document of each token, which attends within it alone; None: a row is one document.
        positions: (B, T) int64, of each token in its document; None: 0, 1, 2, ... in each row.
        extra: tensors that only some tasks need (labels, the sequences of a pair).
    """

    ids: Tensor
    targets: Tensor
    doc_ids: Tensor | None = None
    positions: Tensor | None = None
    extra: Mapping[str, Tensor] = MappingProxyType({})

    def parts(self) -> tuple[Any, ...]:
        """Return the fields, without `extra` if it is empty."""
        return tuple(self) if self.extra else tuple(self)[:-1]


class Loader(Protocol):
    """An endless source of batches whose order is a function of its seed, and whose whole state is its position."""

    def __next__(self) -> Any:
        """Return a Batch, or (ids, targets)."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain values (JSON), and what identifies the data."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly after `state`. Raises UserError if it is of other data."""

    def close(self) -> None:
        """Stop what runs ahead, if anything does."""
