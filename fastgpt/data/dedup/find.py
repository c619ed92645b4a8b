"""The global search for duplicates: equal hashes first, then pairs of a common band, each compared by its texts.

Memory: 5 bytes a document in two arrays (in files where they are large) and 4 more in a third with keep="longest" or
parts of earlier generations, 28 bytes for each of the `rows_in_memory` documents of one band that are sorted at once,
and the texts and shingles of one batch of pairs. Everything else stays in the files of the parts, which are read column
by column. 100 million documents need 500 MB in these files, 112 MB for sorting and about 150 MB for a batch.

Buckets: all pairs of a bucket of up to `settings.bucket` documents are compared, unless they are already in one
cluster. A larger bucket, usually of boilerplate, would need a quadratic number of comparisons. There each document is
compared with the first document of each cluster, for `settings.bucket` clusters at most. What is lost: a document that
is similar to a member of a cluster but not to its first document, and one of the clusters beyond the limit, unless the
pair meets in another of the bands. Clusters are transitive: two documents of a cluster can be less similar to each
other than the threshold if others link them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fastgpt.data.dedup.buckets import buckets, firsts
from fastgpt.data.dedup.forest import Forest, allocate
from fastgpt.data.dedup.parts import Catalogue, DedupPart
from fastgpt.data.dedup.result import Duplicates, Work, choose
from fastgpt.data.dedup.settings import DedupSettings
from fastgpt.data.dedup.similarity import similarities
from fastgpt.data.dedup.words import mix

MAX_FAILED = 1 << 23  # pairs that are not similar, remembered so that no other band compares them again

TextsOf = Callable[[DedupPart, np.ndarray], Sequence[str]]


def find(
    parts: Sequence[DedupPart],
    texts_of: TextsOf,
    settings: DedupSettings = DedupSettings(),
    scratch: Path | None = None,
) -> Duplicates:
    """Find the duplicates in all parts and choose which documents stay.

    Of each cluster exactly one document stays: one that is held out rather than one of training data, then the choice
    of `settings.keep`. Where an earlier generation kept a document of the cluster, this one stays and all new ones are
    dropped; a new document that links two clusters of the earlier generation drops neither of their kept documents.

    Args:
        parts: the parts, in any order
        texts_of: returns the texts of rows (ascending) of a part; it is called for candidates only, part after part
        settings: what counts as a duplicate and what stays; the fingerprints must have been made with the same
        scratch: folder for arrays beyond 256 MB; None keeps them in memory

    Raises:
        ValueError: two parts with one name, or 2^32 documents
    """
    catalogue = Catalogue(parts, settings)
    search = _Search(catalogue, texts_of, settings, scratch)
    search.join_earlier()
    search.join_equal()
    if settings.near:
        for band in range(settings.bands):
            search.join_similar(band)
    search.forest.flatten()
    choose(catalogue, search.forest.parent, settings, scratch)
    return Duplicates(catalogue, search.forest.parent, search.twin, search.sample, search.work)


class _Search:
    def __init__(self, catalogue: Catalogue, texts_of: TextsOf, settings: DedupSettings, scratch: Path | None) -> None:
        self.catalogue, self.texts_of, self.settings = catalogue, texts_of, settings
        self.forest = Forest(len(catalogue), scratch)
        self.twin = allocate(len(catalogue), np.bool_, scratch)  # equal to a document before it
        self.failed = np.zeros(0, np.uint64)
        self.sample = np.zeros(0, np.uint64), np.zeros(0)  # pairs as a << 32 | b, and their similarity
        self.work = Work()

    def join_earlier(self) -> None:
        """Join the clusters of earlier generations, without a look at their texts."""

        def column(part: DedupPart) -> np.ndarray:
            return part.earlier.cluster if part.earlier else np.zeros(len(part.fingerprints()), np.uint64)

        if self.catalogue.earlier:
            for members, bucket in buckets(self.catalogue, column, None, self.settings.rows_in_memory):
                self.forest.union(_representatives(members, bucket), members)

    def join_equal(self) -> None:
        """Join documents with equal text, empty ones excepted."""

        def column(part: DedupPart) -> np.ndarray:
            prints = part.fingerprints()
            return np.where(prints.lengths > 0, prints.exact[:, 0] | np.uint64(1), np.uint64(0))

        for members, bucket in buckets(self.catalogue, column, None, self.settings.rows_in_memory):
            exact = self.catalogue.gather(members, lambda prints: prints.exact)  # (n, 2)
            order = np.lexsort((exact[:, 1], exact[:, 0], bucket))  # stable: members of equal hashes stay ascending
            members, exact = members[order], exact[order]
            first = np.ones(len(members), bool)
            first[1:] = (exact[1:] != exact[:-1]).any(1)
            self.forest.union(members[first][np.cumsum(first) - 1], members)
            self.twin[members[~first]] = True

    def join_similar(self, band: int) -> None:
        """Join the similar documents among those that share a band."""

        def column(part: DedupPart) -> np.ndarray:
            return np.asarray(part.fingerprints().bands[:, band])

        for members, bucket in buckets(self.catalogue, column, self.twin, self.settings.rows_in_memory):
            self._compare(members, bucket)

    def _compare(self, members: np.ndarray, bucket: np.ndarray) -> None:
        sizes = np.bincount(bucket)
        self.work.largest_bucket = max(self.work.largest_bucket, int(sizes.max(initial=0)))
        for _ in range(self.settings.bucket):
            if not len(members):
                return
            first = firsts(bucket)
            heads = _representatives(members, bucket)
            apart = ~first & (self.forest.roots(members) != self.forest.roots(heads))
            apart &= (members >= self.catalogue.earlier) | (heads >= self.catalogue.earlier)
            self._verify(heads[apart], members[apart])
            joined = self.forest.roots(members) == self.forest.roots(heads)
            left = ~first & ((sizes[bucket] <= self.settings.bucket) | ~joined)
            members, bucket = members[left], bucket[left]
        self.work.cut_buckets += len(np.unique(bucket))

    def _verify(self, a: np.ndarray, b: np.ndarray) -> None:
        """Compare the texts of pairs a[i] < b[i] that no band compared before, and join the similar ones."""
        keys = np.setdiff1d(a.astype(np.uint64) << np.uint64(32) | b, self.failed)
        if not len(keys):
            return
        a, b = (keys >> np.uint64(32)).astype(np.uint32), keys.astype(np.uint32)
        found = similarities(a, b, self._texts, self._lengths, self.settings)
        similar = found >= self.settings.threshold
        self.forest.union(a[similar], b[similar])
        self.failed = np.union1d(self.failed, keys[~similar])[:MAX_FAILED]
        self.work.compared += len(keys)
        self.work.similar += int(np.count_nonzero(similar))
        self._draw(keys[similar], found[similar])

    def _draw(self, keys: np.ndarray, found: np.ndarray) -> None:
        """Keep a sample of the similar pairs that does not depend on the order in which they are found."""
        keys, found = np.concatenate([self.sample[0], keys]), np.concatenate([self.sample[1], found])
        chosen = np.argsort(mix(keys), kind="stable")[: self.settings.samples]
        self.sample = keys[chosen], found[chosen]

    def _texts(self, documents: np.ndarray) -> list[str]:
        texts: list[str] = []
        for part, _, rows in self.catalogue.rows(documents):
            read = self.texts_of(part, rows)
            assert len(read) == len(rows), f"texts_of returned {len(read)} texts for {len(rows)} rows of {part.name}"
            texts += read
        return texts

    def _lengths(self, documents: np.ndarray) -> np.ndarray:
        return self.catalogue.gather(documents, lambda prints: prints.lengths)


def _representatives(members: np.ndarray, bucket: np.ndarray) -> np.ndarray:
    """Return the first member of each member's bucket: (n,) uint32."""
    first = firsts(bucket)
    return members[first][np.cumsum(first) - 1]
