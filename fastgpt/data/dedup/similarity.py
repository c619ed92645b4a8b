"""The true Jaccard similarity of candidate pairs, from the texts themselves, read in the order in which they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fastgpt.data.dedup.settings import DedupSettings
from fastgpt.data.dedup.words import chunks, grams, hash_words

AT_ONCE = 1 << 25  # characters of the documents that are compared in one go

Lengths = Callable[[np.ndarray], np.ndarray]
Texts = Callable[[np.ndarray], Sequence[str]]


def shingle_sets(texts: Sequence[str], shingle: int) -> list[np.ndarray]:
    """Return the set of each text's shingles as hashes: sorted (S,) uint64 without repeats, empty for no words."""
    sets: list[np.ndarray] = []
    for part in chunks(texts):
        hashes, _, bounds = grams(hash_words(texts[part]), shingle)
        sets += [np.unique(hashes[start:end]) for start, end in zip(bounds[:-1], bounds[1:])]
    return sets


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Return |a and b| / |a or b| of two sets of `shingle_sets`; 1 for two empty sets."""
    both = np.sort(np.concatenate([a, b]), kind="stable")  # linear: two sorted runs are merged
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(both) - shared) if len(both) else 1.0


def similarities(a: np.ndarray, b: np.ndarray, texts: Texts, lengths: Lengths, settings: DedupSettings) -> np.ndarray:
    """Return the Jaccard similarity of the documents a[i] and b[i]: (pairs,) float64.

    Args:
        a, b: (pairs,) numbers of documents, sorted by a
        texts: returns the texts of documents; the numbers it receives ascend
        lengths: returns their lengths in characters
        settings: `shingle` matters here
    """
    result = np.empty(len(a))
    for batch in _batches(lengths(a) + lengths(b)):
        documents = np.unique(np.concatenate([a[batch], b[batch]]))
        sets = shingle_sets(texts(documents), settings.shingle)
        left, right = np.searchsorted(documents, a[batch]).tolist(), np.searchsorted(documents, b[batch]).tolist()
        result[batch] = [jaccard(sets[i], sets[j]) for i, j in zip(left, right)]
    return result


def _batches(sizes: np.ndarray) -> Iterator[slice]:
    """Yield slices of pairs whose sizes add up to at most AT_ONCE, or of one pair."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        before = int(ends[start - 1]) if start else 0
        end = max(int(np.searchsorted(ends, before + AT_ONCE, "right")), start + 1)
        yield slice(start, end)
        start = end
