"""Which documents stay, and the account of the others."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastgpt.data.dedup.forest import allocate
from fastgpt.data.dedup.parts import Catalogue, DedupPart, Outcome
from fastgpt.data.dedup.settings import DedupSettings
from fastgpt.data.dedup.words import mix


@dataclass(slots=True)
class Pair:
    """Two near-duplicates, each as (name of the part, row), and their Jaccard similarity."""

    first: tuple[str, int]
    second: tuple[str, int]
    similarity: float


@dataclass(slots=True)
class Counts:
    """Documents dropped because one that is kept has the same text (exact) or a similar one (near)."""

    exact: int = 0
    near: int = 0


@dataclass(slots=True)
class Work:
    """What the search did.

    Attributes:
        compared: pairs whose texts were compared
        similar: pairs among them that reached the threshold
        largest_bucket: documents that share a band
        cut_buckets: buckets with more clusters than representatives, where some pairs were not compared
    """

    compared: int = 0
    similar: int = 0
    largest_bucket: int = 0
    cut_buckets: int = 0


class Duplicates:
    """The result of `find`.

    Attributes:
        counts: dropped documents of this generation, by (source of the dropped document, source of the kept one)
        empty: empty documents of this generation by source; they are dropped and belong to no cluster
        pairs: a sample of the pairs found similar, at most `settings.samples`
        work: what the search did
    """

    def __init__(
        self,
        catalogue: Catalogue,
        kept: np.ndarray,
        twin: np.ndarray,
        sample: tuple[np.ndarray, np.ndarray],
        work: Work,
    ) -> None:
        self._catalogue, self._kept, self.work = catalogue, kept, work
        self._numbers = {part.name: numbers for part, numbers in catalogue}
        self.pairs = [
            Pair(catalogue.locate(int(key) >> 32), catalogue.locate(int(key) & 0xFFFFFFFF), float(similarity))
            for key, similarity in zip(*sample)
        ]
        self.counts: dict[tuple[str, str], Counts] = {}
        self.empty: Counter[str] = Counter()
        for part, numbers in catalogue:
            if part.earlier is None:
                self._count(part, numbers, twin[numbers])

    def outcome(self, part: DedupPart) -> Outcome:
        """Return what became of the documents of a part; of an earlier one, its clusters joined to the new ones."""
        kept = self._kept[self._numbers[part.name]]
        prints = part.fingerprints()
        label = mix(self._catalogue.gather(kept, lambda prints: prints.exact[:, 0])) | np.uint64(1)
        cluster = np.where(prints.lengths > 0, label, np.uint64(0))
        return Outcome(part.earlier.keep if part.earlier else self.keep(part), cluster)

    def keep(self, part: DedupPart) -> np.ndarray:
        """Return which documents of a part stay: (n,) bool."""
        if part.earlier:
            return part.earlier.keep
        numbers = self._numbers[part.name]
        alone = self._kept[numbers] == np.arange(numbers.start, numbers.stop)
        return alone & (part.fingerprints().lengths > 0)

    def _count(self, part: DedupPart, numbers: slice, twin: np.ndarray) -> None:
        empty = part.fingerprints().lengths == 0
        if empty.any():
            self.empty[part.source] += int(np.count_nonzero(empty))
        dropped = np.flatnonzero(~self.keep(part) & ~empty)
        owners = self._catalogue.part_of(self._kept[numbers][dropped])
        for owner in np.unique(owners).tolist():
            counts = self.counts.setdefault((part.source, self._catalogue.parts[owner].source), Counts())
            exact = int(np.count_nonzero(twin[dropped[owners == owner]]))
            counts.exact += exact
            counts.near += int(np.count_nonzero(owners == owner)) - exact


def choose(catalogue: Catalogue, roots: np.ndarray, settings: DedupSettings, scratch: Path | None = None) -> None:
    """Replace the root of each document by the document of its cluster that stays, in place.

    The root is the first document of the cluster, which is the right one unless lengths or earlier generations matter.
    Then blocks of documents compete, one after another, with the best ones of their clusters so far: a cluster may be
    larger than memory. `scratch` is the folder of a large array, 4 bytes a document.
    """
    if settings.keep != "longest" and not catalogue.earlier:
        return
    step = max(settings.rows_in_memory // 2, 1)
    best = allocate(len(roots), np.uint32, scratch)  # of the cluster of each root
    for start in range(0, len(roots), step):
        block = np.arange(start, min(start + step, len(roots)), dtype=np.uint32)
        best[block] = block
    for start in range(0, len(roots), step):
        block = np.arange(start, min(start + step, len(roots)), dtype=np.uint32)
        joined = block[roots[block] != block]
        heads = np.unique(roots[joined])
        members, owners = np.concatenate([joined, best[heads]]), np.concatenate([roots[joined], heads])
        best[owners] = _best(catalogue, owners, members, settings)
    for start in range(0, len(roots), step):
        roots[start : start + step] = best[roots[start : start + step]]


def _best(catalogue: Catalogue, roots: np.ndarray, members: np.ndarray, settings: DedupSettings) -> np.ndarray:
    """Return for each member the document of its cluster that stays: (n,) int64."""
    rank = np.where(members < catalogue.training, 1, 2)
    for part, places, rows in catalogue.rows(members):
        if part.earlier:
            rank[places] = np.where(part.earlier.keep[rows], 0, 3)
    shorter = -catalogue.gather(members, lambda prints: prints.lengths)
    order = np.lexsort((members, *([shorter] if settings.keep == "longest" else []), rank, roots))
    first = np.concatenate([[True], roots[order][1:] != roots[order][:-1]])[: len(order)]
    best = np.empty(len(members), np.uint32)
    best[order] = members[order][first][np.cumsum(first) - 1]
    return best
