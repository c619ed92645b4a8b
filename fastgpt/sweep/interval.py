"""Means over seeds and their 95 % intervals.

    mean +- t(n - 1) s / sqrt(n)        s: standard deviation of the n values, t: 97.5 % quantile of Student's t

Source of the distribution for whole degrees of freedom: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple


class Mean(NamedTuple):
    """A mean and half the width of its 95 % interval, None for fewer than two values."""

    value: float
    reach: float | None


def mean(values: Sequence[float]) -> Mean:
    """Return the mean of values, at least one, with its interval."""
    n = len(values)
    middle = statistics.fmean(values)
    return Mean(middle, None if n < 2 else t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n))


def within(angle: float, freedom: int) -> float:
    """Return P(|T| < t) for t = sqrt(freedom) tan(angle)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    total, term = 0.0, cosine if odd else 1.0
    for i in range(1 + odd, freedom, 2):
        total += term
        term *= cosine * cosine * i / (i + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


@cache
def t_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t for 1, 2, ... degrees of freedom."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, freedom) < 0.95 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)
