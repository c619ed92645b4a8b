"""Stand-in for fastgpt/training/task.py."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    ids: Tensor
    targets: Tensor
    doc_ids: Tensor | None = None
    positions: Tensor | None = None
    extra: dict[str, Tensor] = {}
