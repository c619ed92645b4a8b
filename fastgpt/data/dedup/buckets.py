"""Buckets of documents with an equal hash, found by sorting, a bounded number of documents at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from fastgpt.data.dedup.parts import Catalogue, DedupPart

Column = Callable[[DedupPart], np.ndarray]


def buckets(
    catalogue: Catalogue, column: Column, unwanted: np.ndarray | None, at_once: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the documents that share their hash with another, in passes over ranges of the hashes.

    Args:
        catalogue: the parts
        column: returns one hash (uint64) for each document of a part; 0 for a document that is in no bucket
        unwanted: (documents,) bool, documents to pass over; None for none
        at_once: documents to sort in a pass, on average

    Yields:
        members: (n,) uint32, bucket after bucket, ascending in each
        bucket: (n,) int64, the number of each member's bucket, ascending
    """
    bits = (max(len(catalogue) - 1, 0) // at_once).bit_length()  # 2^bits passes
    for value in range(1 << bits):
        hashes: list[np.ndarray] = []
        members: list[np.ndarray] = []
        for part, numbers in catalogue:
            values = column(part)
            here = values != 0
            if bits:
                here &= values >> np.uint64(64 - bits) == value
            if unwanted is not None:
                here &= ~unwanted[numbers]
            rows = np.flatnonzero(here)
            hashes.append(values[rows])
            members.append((rows + numbers.start).astype(np.uint32))
        if sum(map(len, members)):
            yield _runs(np.concatenate(hashes), np.concatenate(members))


def _runs(hashes: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the members whose hash occurs more than once, ordered by hash, and the number of each one's run."""
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    same = np.concatenate([[False], hashes[1:] == hashes[:-1], [False]])
    repeated = same[1:] | same[:-1]
    return members[order[repeated]], np.cumsum(~same[:-1][repeated]) - 1


def firsts(bucket: np.ndarray) -> np.ndarray:
    """Return whether each member is the first of its bucket: (n,) bool."""
    return np.concatenate([[True], bucket[1:] != bucket[:-1]]) if len(bucket) else np.zeros(0, bool)
