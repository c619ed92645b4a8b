"""Near-duplicates: fastgpt against datasketch on the same texts, with the same bands, and the recall of both."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastgpt.data.dedup import DedupPart, DedupSettings, find, fingerprint
from fastgpt.data.dedup.similarity import jaccard, shingle_sets


@dataclass(slots=True)
class Measured:
    """The result of one library.

    Attributes:
        seconds: CPU time from the texts to the pairs or clusters
        megabytes: characters of the texts, in millions
        recall: share of the planted pairs at or above the threshold that were found
        planted: the number of these pairs
    """

    seconds: float
    megabytes: float
    recall: float
    planted: int


def plant(texts: Sequence[str], copies: int, seed: int = 0) -> tuple[list[str], list[tuple[int, int]]]:
    """Return the texts and copies of some of them in which one to five words are others.

    Returns:
        The texts with the copies at the end, and the pairs (original, copy) as indices.
    """
    rng = random.Random(seed)
    result, pairs = list(texts), []
    for original in rng.sample(range(len(texts)), copies):
        words = texts[original].split(" ")
        places = [i for i, word in enumerate(words) if word.strip()]
        for i in rng.sample(places, min(rng.randint(1, 5), len(places))):
            words[i] = f"other{rng.randrange(1000)}"
        pairs.append((original, len(result)))
        result.append(" ".join(words))
    return result, pairs


def planted_duplicates(
    texts: Sequence[str], pairs: Sequence[tuple[int, int]], settings: DedupSettings
) -> list[tuple[int, int]]:
    """Return the pairs whose true similarity reaches the threshold."""
    sets = [shingle_sets([texts[i] for i in side], settings.shingle) for side in zip(*pairs)]
    return [pair for pair, a, b in zip(pairs, *sets) if jaccard(a, b) >= settings.threshold]


def measure_fastgpt(
    texts: Sequence[str], pairs: Sequence[tuple[int, int]], settings: DedupSettings = DedupSettings()
) -> Measured:
    """Time fingerprints and search. A pair is found if both are in one cluster."""
    start = time.process_time()
    part = DedupPart("texts", "texts", "train", fingerprint(texts, settings))
    found = find([part], lambda _, rows: [texts[i] for i in rows], settings)
    seconds = time.process_time() - start
    cluster = found.outcome(part).cluster
    return _measured(texts, seconds, [bool(cluster[a] == cluster[b]) for a, b in pairs])


def measure_datasketch(
    texts: Sequence[str], pairs: Sequence[tuple[int, int]], settings: DedupSettings = DedupSettings()
) -> Measured:
    """Time MinHash.bulk and MinHashLSH on the same shingles, unverified. A pair is found if a query finds it."""
    from datasketch import MinHash, MinHashLSH

    start = time.process_time()
    n = settings.shingle
    shingles = []
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        shingles.append({" ".join(words[i : i + n]).encode() for i in range(max(len(words) - n + 1, 1))})
    index = MinHashLSH(num_perm=settings.bands * settings.rows, params=(settings.bands, settings.rows))
    hashes = MinHash.bulk(shingles, num_perm=settings.bands * settings.rows, seed=settings.seed)
    for i, minhash in enumerate(hashes):
        index.insert(i, minhash)
    neighbours = [set(index.query(minhash)) for minhash in hashes]
    seconds = time.process_time() - start
    return _measured(texts, seconds, [b in neighbours[a] for a, b in pairs])


def _measured(texts: Sequence[str], seconds: float, found: list[bool]) -> Measured:
    return Measured(seconds, sum(map(len, texts)) / 1e6, float(np.mean(found)), len(found))
