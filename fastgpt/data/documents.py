"""Documents in a stream of tokens, which begin with an end-of-text token each: their borders, for packing and masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.data.shards import Tokens

Ids = npt.NDArray[Any]


def document_starts(tokens: Tokens, eot: int) -> npt.NDArray[np.int64]:
    """Return where documents start, and behind them the number of tokens: (documents + 1,) int64.

    They are read from the index beside a shard (.idx), or found by their end-of-text token. What stands before the
    first one counts as a document.
    """
    found, at = [np.zeros(1, np.int64)], 0
    for name, part in zip(tokens.names, tokens.parts, strict=True):
        starts = _index(Path(name), len(part))
        if starts is None:
            chunks = Tokens([part]).chunks()
            starts = np.concatenate([np.flatnonzero(ids == eot) + first for _, first, ids in chunks])
        found.append(starts + at)
        at += len(part)
    every = np.concatenate([*found, [at]])
    return every[np.append(every[1:] > every[:-1], True)]  # 0 is there twice if a document starts there


def _index(path: Path, tokens: int) -> npt.NDArray[np.int64] | None:
    """Return the document starts of a shard from its index; None if it has none that fits."""
    index = path.with_suffix(".idx")
    if not index.is_file() or index == path:
        return None
    starts = np.fromfile(index, "<i8")
    return starts[:-1] if len(starts) and starts[-1] == tokens else None


def mark_documents(ids: Ids, eot: int, doc_ids: Ids, positions: Ids) -> None:
    """Write the document of each token, counted from the first of its row, and its position there; all (B, T).

    A document begins at each `eot`, and at the beginning of a row.
    """
    starts = ids == eot
    np.cumsum(starts, axis=1, out=doc_ids)
    column = np.arange(ids.shape[1])
    positions[:] = column - np.maximum.accumulate(np.where(starts, column, 0), axis=1)
