"""Shares with Wilson intervals, ids of items, and a permutation test of the largest gap between groups."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fastgpt.evaluate.results import Figure

Z = 1.959963984540054  # of a 95 % interval
PERMUTATIONS = 10_000  # at most; fewer distinct ones are all computed


def wilson(hits: int, n: int, z: float = Z) -> tuple[float, float]:
    """Return the score interval of a share (Wilson 1927), which lies within 0 to 1 and holds for small n."""
    share, wide = hits / n, z * z / n
    middle = (share + wide / 2) / (1 + wide)
    half = z * math.sqrt(share * (1 - share) / n + wide / (4 * n)) / (1 + wide)
    return (0.0 if hits == 0 else middle - half), (1.0 if hits == n else middle + half)


def share(task: str, metric: str, hits: int, n: int, **more: Any) -> Figure:
    """Return a share as a figure with its Wilson interval of 95 %."""
    low, high = wilson(hits, n)
    value = hits / n
    stderr = math.sqrt(value * (1 - value) / (n - 1)) if n > 1 else None
    return Figure(task, metric, value, n, stderr, low=low, high=high, **more)


def item_id(item: Any) -> str:
    """Return an id that depends on the contents of an item alone: 16 hex digits."""
    text = json.dumps(item, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def largest_gap(groups: Mapping[str, Sequence[float]]) -> float:
    """Return the largest difference between the means of two groups."""
    means = [sum(values) / len(values) for values in groups.values()]
    return max(means) - min(means)


def permutation_p(groups: Mapping[str, Sequence[float]], seed: int = 0) -> float:
    """Return the probability of a gap at least as large if the groups' names were given to the values by chance.

    All assignments count if there are at most PERMUTATIONS, else a sample of that size and the observed one (Phipson
    and Smyth 2010: never 0).
    """
    values = np.array([v for group in groups.values() for v in group], np.float64)
    sizes = [len(group) for group in groups.values()]
    observed = largest_gap(groups) - 1e-12 * max(1.0, float(np.abs(values).max()))
    if ways(sizes) <= PERMUTATIONS:
        gaps = np.array([_gap(values, parts) for parts in _assignments(tuple(range(len(values))), sizes)])
        return float((gaps >= observed).mean())
    random, cuts = np.random.default_rng(seed), np.cumsum(sizes)[:-1]
    drawn = [_gap(values, np.split(random.permutation(len(values)), cuts)) for _ in range(PERMUTATIONS)]
    return (1 + sum(gap >= observed for gap in drawn)) / (1 + PERMUTATIONS)


def ways(sizes: Sequence[int]) -> int:
    """Return in how many ways values can be divided into groups of these sizes."""
    return math.factorial(sum(sizes)) // math.prod(map(math.factorial, sizes))


def _gap(values: np.ndarray[Any, Any], parts: Sequence[Any]) -> float:
    means = [values[list(part)].mean() for part in parts]
    return float(max(means) - min(means))


def _assignments(places: tuple[int, ...], sizes: Sequence[int]) -> Iterator[list[tuple[int, ...]]]:
    if len(sizes) == 1:
        yield [places]
        return
    for first in itertools.combinations(places, sizes[0]):
        rest = tuple(p for p in places if p not in first)
        for others in _assignments(rest, sizes[1:]):
            yield [first, *others]
