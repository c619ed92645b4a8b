"""The parts of a corpus in one order, and the numbers of their documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastgpt.data.dedup.fingerprint import Fingerprints
from fastgpt.data.dedup.settings import DedupSettings

LIMIT = 1 << 32  # documents; their numbers are uint32
TRAINING = "train"


@dataclass(slots=True)
class Outcome:
    """What became of the n documents of a part.

    Attributes:
        keep: (n,) bool
        cluster: (n,) uint64, equal for the documents of one cluster; 0 for an empty document
    """

    keep: np.ndarray
    cluster: np.ndarray


@dataclass(slots=True)
class DedupPart:
    """One part of the corpus, or of an earlier generation of it.

    Attributes:
        name: unique; parts are ordered by name
        source: the source that the counts name
        split: "train", or another name for documents that are held out; of duplicates these stay
        prints: the fingerprints, or the stem of their files
        earlier: for a part of an earlier generation, its outcome then; what was kept stays kept
    """

    name: str
    source: str
    split: str
    prints: Fingerprints | Path
    earlier: Outcome | None = None

    def fingerprints(self) -> Fingerprints:
        """Return the fingerprints; those in files stay there until they are read."""
        return Fingerprints.load(self.prints) if isinstance(self.prints, Path) else self.prints


class Catalogue:
    """The parts in the order in which their documents are preferred, and a number for each document.

    Earlier generations come first, then what is held out, then training data; with keep="source" the preferred sources
    come first among these; then the names decide. The number of a document is its place in this order.

    Attributes:
        parts: the parts in order
        offsets: (parts + 1,) int64; the documents of parts[i] are offsets[i] to offsets[i + 1]
        earlier: documents of earlier generations; their numbers are below this
        training: number of the first training document of this generation
    """

    def __init__(self, parts: Sequence[DedupPart], settings: DedupSettings) -> None:
        repeated = [name for name, count in Counter(part.name for part in parts).items() if count > 1]
        if repeated:
            raise ValueError(f"parts of deduplication: got the name {repeated[0]!r} more than once, expected it once")
        rank = {source: i for i, source in enumerate(settings.prefer if settings.keep == "source" else ())}

        def place(part: DedupPart) -> tuple[bool, bool, int, str]:
            return part.earlier is None, part.split == TRAINING, rank.get(part.source, len(rank)), part.name

        self.parts = sorted(parts, key=place)
        sizes = [len(part.fingerprints()) for part in self.parts]
        self.offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        if len(self) >= LIMIT:
            raise ValueError(f"parts of deduplication: got {len(self)} documents, expected fewer than {LIMIT}")
        self.earlier = int(self.offsets[sum(part.earlier is not None for part in self.parts)])
        held_out = sum(part.earlier is not None or part.split != TRAINING for part in self.parts)
        self.training = int(self.offsets[held_out])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __iter__(self) -> Iterator[tuple[DedupPart, slice]]:
        """Yield each part and the slice of its documents' numbers."""
        for i, part in enumerate(self.parts):
            yield part, slice(int(self.offsets[i]), int(self.offsets[i + 1]))

    def part_of(self, documents: np.ndarray) -> np.ndarray:
        """Return the index of the part that holds each document: (n,) int64."""
        return np.searchsorted(self.offsets, documents, "right") - 1

    def locate(self, document: int) -> tuple[str, int]:
        """Return the name of a document's part and its row there."""
        part = int(self.part_of(np.array([document]))[0])
        return self.parts[part].name, document - int(self.offsets[part])

    def rows(self, documents: np.ndarray) -> Iterator[tuple[DedupPart, np.ndarray, np.ndarray]]:
        """Yield each part that holds any of the documents, the places of these in `documents`, and their rows."""
        owner = self.part_of(documents)
        order = np.argsort(owner, kind="stable")
        for places in np.split(order, np.flatnonzero(np.diff(owner[order])) + 1):
            if len(places):
                part = int(owner[places[0]])
                yield self.parts[part], places, documents[places].astype(np.int64) - self.offsets[part]

    def gather(self, documents: np.ndarray, read: Callable[[Fingerprints], np.ndarray]) -> np.ndarray:
        """Return the rows of the array that `read` returns which belong to the documents: (n, ...)."""
        pieces = [(places, read(part.fingerprints())[rows]) for part, places, rows in self.rows(documents)]
        if not pieces:
            return read(self.parts[0].fingerprints())[:0]
        result = np.empty((len(documents), *pieces[0][1].shape[1:]), pieces[0][1].dtype)
        for places, values in pieces:
            result[places] = values
        return result
