"""Topics of a sample of documents: clusters of texts with common words, named by the words that set them apart.

Words are counted in a table by their hash, weighted by term frequency and inverse document frequency, and grouped by
spherical k-means (Dhillon and Modha 2001). The result shows what a collection is about; it is not a measurement.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

COLUMNS = 4096
CHARACTERS = 20_000  # of a document that are looked at
ROUNDS = 20
WORDS = 5  # that name a topic
_WORD = re.compile(r"[^\W\d_]{4,}")


@dataclass(frozen=True)
class Topic:
    """A group of documents.

    Attributes:
        words: the words that set it apart, the strongest first.
        share: of all documents.
        sources: source -> share of its documents.
    """

    words: list[str]
    share: float
    sources: dict[str, float]


def topics(texts: Sequence[str], sources: Sequence[str], count: int = 8) -> list[Topic]:
    """Return at most `count` topics of texts, the largest first; the same for the same texts.

    Args:
        texts: documents.
        sources: the source of each.
    """
    counts = [Counter(_WORD.findall(text[:CHARACTERS].lower())) for text in texts]
    known = [i for i, words in enumerate(counts) if words]
    if len(known) < 2:
        return []
    vectors = _vectors([counts[i] for i in known])
    groups = _cluster(vectors, min(count, len(known)))
    seen = Counter(word for i in known for word in counts[i])
    found = []
    for group in range(int(groups.max()) + 1):
        members = [known[i] for i in np.flatnonzero(groups == group)]
        if not members:
            continue
        inside = Counter(word for i in members for word in counts[i])
        rest = len(known) - len(members) + 1
        score = {w: _score(n / len(members), (seen[w] - n + 1) / rest) for w, n in inside.items()}
        apart = [word for word, value in score.items() if value > 0]
        words = sorted(apart, key=lambda w: (-score[w], w))[:WORDS]
        by_source = Counter(sources[i] for i in members)
        total = Counter(sources[i] for i in known)
        shares = {name: by_source[name] / n for name, n in total.items()}
        found.append(Topic(words, len(members) / len(known), shares))
    return sorted(found, key=lambda topic: (-topic.share, topic.words))


def _score(inside: float, outside: float) -> float:
    """Return how much a word sets a topic apart, from its occurrences per document inside and outside of it."""
    return inside * float(np.log(inside / outside))


def _vectors(counts: Sequence[Counter[str]]) -> npt.NDArray[np.float32]:
    """Return a row of length 1 for each document, (n, COLUMNS)."""
    rows = np.zeros((len(counts), COLUMNS), np.float32)
    for row, words in zip(rows, counts, strict=True):
        for word, n in words.items():
            row[zlib.crc32(word.encode()) % COLUMNS] += n
    rows = np.log1p(rows) * np.log((1 + len(rows)) / (1 + np.count_nonzero(rows, axis=0))).astype(np.float32)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    return rows


def _cluster(vectors: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.intp]:
    """Return the number of each row's group, (n,). Each first centre is the row least like those before."""
    chosen = [0]
    nearest = vectors @ vectors[0]
    while len(chosen) < count:
        chosen.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, vectors @ vectors[chosen[-1]])
    centres = vectors[chosen]
    groups = np.zeros(len(vectors), np.intp)
    for _ in range(ROUNDS):
        now = (vectors @ centres.T).argmax(axis=1)
        if (now == groups).all() and _ > 0:
            break
        groups = now
        for k in range(count):
            if (groups == k).any():
                centre = vectors[groups == k].sum(axis=0)
                centres[k] = centre / max(float(np.linalg.norm(centre)), 1e-9)
    return groups
