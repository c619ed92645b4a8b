"""Decontamination: which documents overlap evaluation files, and which parts of them stay."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.core.errors import UserError
from fastgpt.data.dedup import NgramIndex
from fastgpt.data.dedup.ngrams import MARGIN, pieces
from fastgpt.data.pipeline.store import Chunk, key_of, new_result
from fastgpt.data.shards import file_hash

MAX_PIECES = 10  # GPT-3 drops documents that would be cut into more

# an n-gram of evaluation files in a document of a chunk; start, end: characters
HIT = np.dtype([("row", "<i4"), ("gram", "<u8"), ("start", "<i8"), ("end", "<i8")])
# a part of a document that stays
PIECE = np.dtype([("row", "<i4"), ("start", "<i8"), ("end", "<i8")])


@dataclass(frozen=True)
class LeakTask:
    """Find the n-grams of evaluation files in the documents of a chunk; `contents` is the files' digest."""

    chunk: Chunk
    files: tuple[str, ...]
    contents: str
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / key_of("leaks", self.chunk.key, self.contents)


def contents_of(files: Sequence[str]) -> str:
    """Return a digest of evaluation files. Raises UserError if one is missing."""
    for path in files:
        if not Path(path).is_file():
            raise UserError(f"decontaminate names {path}, expected a file")
    return key_of([file_hash(Path(path)) for path in files])


def find_leaks(task: LeakTask) -> None:
    """Write the n-grams of evaluation files in the documents of a chunk: hits.npy, (n,) of HIT in the rows' order."""
    if task.path.exists():
        return
    index = _index(task.files, task.contents)
    found = (hits for texts in task.chunk.texts() for hits in index.hits_of(texts))
    rows = [(row, hit.gram, hit.start, hit.end) for row, hits in enumerate(found) for hit in hits]
    with new_result(task.path) as aside:
        np.save(aside / "hits.npy", np.array(rows, HIT))


@functools.lru_cache(1)
def _index(files: tuple[str, ...], contents: str) -> NgramIndex:
    return NgramIndex.from_files(list(files))


def read_hits(folder: Path) -> npt.NDArray[Any]:
    """Return what `find_leaks` wrote."""
    hits: npt.NDArray[Any] = np.load(folder / "hits.npy")
    return hits


def common_grams(hits: Iterable[npt.NDArray[Any]], limit: int) -> npt.NDArray[np.uint64]:
    """Return the n-grams that more than `limit` documents hold: (n,) uint64, ascending. hits: those of each chunk."""
    grams, counts = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    for found in hits:
        once = np.unique(found[["row", "gram"]])["gram"]  # an n-gram counts once for each document
        grams, where = np.unique(np.concatenate([grams, once]), return_inverse=True)
        counts = np.bincount(where, np.concatenate([counts, np.ones(len(once), np.int64)]), len(grams)).astype(np.int64)
    return grams[counts > limit]


def pieces_of(chunk: Chunk, hits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the parts that stay of the documents with hits, (n,) of PIECE: those outside the hits and 200 characters
    on each side of them. Parts of fewer than 200 characters are left out, and documents of more than 10 parts, as for
    GPT-3 (appendix C)."""
    rows, starts = np.unique(hits["row"], return_index=True)
    places = np.split(hits[["start", "end"]], starts[1:])
    texts = (text for batch in chunk.texts(rows) for text in batch)
    found: list[tuple[int, int, int]] = []
    for row, text, own in zip(rows.tolist(), texts, places):
        left = [(a, b) for a, b in pieces(text, sorted(own.tolist()), MARGIN) if b - a >= MARGIN]
        if len(left) <= MAX_PIECES:
            found += [(row, a, b) for a, b in left]
    return np.array(found, PIECE)
