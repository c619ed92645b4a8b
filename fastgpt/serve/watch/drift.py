"""Drift: have the latest answers of a model another distribution than those of a baseline?

Both windows have n answers. Every n / STRIDE answers the latest n are compared with the baseline, measure by measure:
shares by Fisher's exact test, two-sided; numbers by the Kolmogorov-Smirnov statistic D with the bound
P(D >= d) <= e exp(-n d²), which holds for two samples of any n, ties included (Wei and Dudley 2012, "Two-sample
Dvoretzky-Kiefer-Wolfowitz inequalities", theorem 1).

Comparing again and again would raise false alarms sooner or later. So look k may only spend alpha w(k) of the error
(alpha spending: Lan and DeMets 1983), with w(k) = 1 / (c (k + 1) ln²(k + 1)), whose sum over all k is 1, divided by the
number of measures. By the union bound, the probability that a model whose answers are independent and do not change
ever raises an alarm is at most alpha, whatever the dependence between the looks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

SHARES = ("refusal", "repetition", "toxicity")
NUMBERS = ("prompt_tokens", "answer_tokens")
STRIDE = 4  # looks while the answers of a window are replaced
SERIES = 2.109742801  # sum over k from 2 of 1 / (k ln² k)
REPEATED = 0.2  # an answer in which more of the 4-grams have occurred before repeats itself
NO_DRIFT = 0.05  # an alarm ends at a p-value above this
Values = dict[str, float]


def spent(alpha: float, look: int) -> float:
    """Return the error that look number `look`, counted from 1, may spend."""
    return alpha / (SERIES * (look + 1) * math.log(look + 1) ** 2)


def fisher_p(hits: int, others: int, n: int) -> float:
    """Return the two-sided p-value of Fisher's exact test for two shares of n each: the probability of all tables with
    these margins that are at most as likely."""
    total = hits + others
    low, high = max(0, total - n), min(n, total)

    k, logs = np.arange(low, high + 1), _log_factorials(n)
    # log C(n, k) + log C(n, total - k), up to a constant
    ways = -(logs[k] + logs[n - k] + logs[total - k] + logs[n - total + k])
    likely = np.exp(ways - ways.max())
    return float(min(1.0, likely[likely <= likely[hits - low] * (1 + 1e-7)].sum() / likely.sum()))


@lru_cache
def _log_factorials(n: int) -> NDArray[np.float64]:
    """Return log 0!, log 1!, ..., log n!."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])


def smirnov_p(a: Sequence[float], b: Sequence[float]) -> float:
    """Return a bound of the p-value of the Kolmogorov-Smirnov statistic of two samples of the same size."""
    first, second = np.sort(np.asarray(a, float)), np.sort(np.asarray(b, float))
    both = np.concatenate([first, second])
    gaps = np.searchsorted(first, both, "right") - np.searchsorted(second, both, "right")
    d = float(np.abs(gaps).max()) / len(first)
    return min(1.0, math.e * math.exp(-len(first) * d * d))


@dataclass
class Finding:
    """A comparison of a measure: means over the latest answers and over the baseline, the p-value, whether there is an
    alarm, and whether it begins or ends now."""

    measure: str
    value: float
    baseline: float
    p: float
    alarm: bool
    changed: bool


@dataclass
class Window:
    """The latest answers of a model beside those of a baseline.

    Attributes:
        n: answers of a window.
        alpha: probability that an alarm is ever raised though nothing has changed.
        baseline: a list of n values for each measure; while it has fewer, it is being recorded.
    """

    n: int
    alpha: float
    baseline: dict[str, list[float]]
    looks: int = 0
    _latest: deque[Values] = field(default_factory=deque)
    _since: int = 0  # answers since the last look
    _alarms: dict[str, int] = field(default_factory=dict)  # measure -> answers since its alarm was raised

    @property
    def recorded(self) -> bool:
        return max(map(len, self.baseline.values()), default=0) >= self.n

    def add(self, values: Values) -> list[Finding]:
        """Add an answer; return the findings if the latest answers were compared now."""
        if not self.recorded:
            for name, value in values.items():
                self.baseline.setdefault(name, []).append(value)
            return []
        self._latest.append(values)
        if len(self._latest) > self.n:
            self._latest.popleft()
        self._since += 1
        for measure in self._alarms:
            self._alarms[measure] += 1
        if len(self._latest) < self.n or self._since < self.n / STRIDE:
            return []
        self._since = 0
        return self._compare()

    def _has(self, measure: str) -> bool:
        """Return whether every answer of both windows has a measure."""
        return len(self.baseline.get(measure, ())) == self.n and all(measure in values for values in self._latest)

    def _compare(self) -> list[Finding]:
        measures = [name for name in (*SHARES, *NUMBERS) if self._has(name)]
        self.looks += 1
        allowed = spent(self.alpha, self.looks) / len(measures)
        found = []
        for name in measures:
            before, now = self.baseline[name], [values[name] for values in self._latest]
            p = smirnov_p(before, now) if name in NUMBERS else fisher_p(int(sum(before)), int(sum(now)), self.n)
            was = name in self._alarms
            if not was and p <= allowed:
                self._alarms[name] = 0
            elif was and p > NO_DRIFT and self._alarms[name] >= self.n:  # no answer from before the alarm is left
                del self._alarms[name]
            alarm = name in self._alarms
            mean = float(np.mean(now)), float(np.mean(before))
            found.append(Finding(name, *mean, p, alarm, alarm != was))
        return found


def repeats(text: str, n: int = 4) -> float:
    """Return the share of a text's n-grams of words that occurred before in it; 0 for a text without n-grams.

    Source: seq-rep-n of Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training", of words here.
    """
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
