"""Drift: p-values equal SciPy's or bound them, alarms are rarely false, and true ones come once."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from fastgpt.serve.watch.drift import SERIES, Window, fisher_p, repeats, smirnov_p, spent

N = 100  # answers of a window
Values = dict[str, float]


def answer(rng: np.random.Generator, refusal: float = 0.05, length: float = 40) -> Values:
    return {
        "refusal": float(rng.random() < refusal),
        "repetition": float(rng.random() < 0.3),
        "toxicity": float(rng.random() < 0.01),
        "prompt_tokens": float(rng.geometric(1 / 30)),
        "answer_tokens": float(rng.geometric(1 / length)),
    }


def test_shares_have_fishers_p_value() -> None:
    for hits, others in ((0, 0), (0, 7), (3, 3), (20, 41), (99, 100), (100, 100), (1, 90)):
        total = hits + others
        ways = {k: math.comb(N, k) * math.comb(N, total - k) for k in range(max(0, total - N), min(N, total) + 1)}
        exact = Fraction(sum(w for w in ways.values() if w <= ways[hits]), math.comb(2 * N, total))
        assert fisher_p(hits, others, N) == pytest.approx(float(exact), rel=1e-9)


def test_numbers_have_a_bound_of_smirnovs_p_value() -> None:
    """Compared with the share of all ways to divide the values into two samples, ties included."""
    rng = np.random.default_rng(0)
    for values in (rng.normal(size=10), rng.integers(0, 4, 10).astype(float), np.arange(10.0), np.zeros(10)):

        def bound(chosen: tuple[int, ...], values: Any = values) -> float:
            return smirnov_p([values[i] for i in chosen], [values[i] for i in range(10) if i not in chosen])

        bounds = np.array([bound(chosen) for chosen in itertools.combinations(range(10), 5)])
        assert all((bounds <= p).mean() <= p for p in set(bounds))
    assert smirnov_p([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]) == pytest.approx(math.e * math.exp(-3))
    assert smirnov_p([1.0, 2.0, 2.0, 5.0], [2.0, 2.0, 2.0, 2.0]) == pytest.approx(min(1, math.e * math.exp(-4 / 16)))


def test_all_looks_spend_alpha_together() -> None:
    first = sum(spent(1.0, k) for k in range(1, 100_000))
    assert first < 1 < first + 1 / (SERIES * math.log(100_000)) + 1e-3  # the rest is at most that integral


@pytest.mark.slow
def test_false_alarms_are_rarer_than_alpha() -> None:
    """200 servers with 20 windows each, and nothing but chance: with alpha 0.2, at most a share of 0.2 raises any
    alarm. Without the correction for looks most of them would."""
    rng = np.random.default_rng(1)
    alarmed = uncorrected = 0
    servers, answers = 200, 20 * N
    for _ in range(servers):
        window = Window(N, 0.2, {})
        draws = {
            "refusal": (rng.random(N + answers) < 0.2).astype(float),
            "answer_tokens": rng.geometric(1 / 40, N + answers).astype(float),
        }
        found = [f for i in range(N + answers) for f in window.add({k: v[i] for k, v in draws.items()})]
        alarmed += any(f.alarm for f in found)
        uncorrected += any(f.p <= 0.2 / 2 for f in found)
    assert window.looks == (answers - N) * 4 // N + 1
    assert alarmed / servers <= 0.2 < 0.5 < uncorrected / servers


def test_an_alarm_comes_once_and_ends() -> None:
    rng = np.random.default_rng(2)
    window = Window(N, 0.01, {})
    for _ in range(N):
        assert window.add(answer(rng)) == []
    calm = [f for _ in range(5 * N) for f in window.add(answer(rng))]
    assert len(calm) == 5 * (4 * 4 + 1) and not any(f.alarm for f in calm)
    drifted = [f for _ in range(5 * N) for f in window.add(answer(rng, refusal=0.6, length=4))]
    assert sorted(f.measure for f in drifted if f.changed) == ["answer_tokens", "refusal"]
    assert all(f.alarm for f in drifted if f.changed)
    last = {f.measure: f for f in drifted[-5:]}
    assert last["refusal"].value > 0.4 > 0.15 > last["refusal"].baseline and last["refusal"].alarm
    over = [f for _ in range(5 * N) for f in window.add(answer(rng))]
    assert sorted(f.measure for f in over if f.changed) == ["answer_tokens", "refusal"]
    assert not any(f.alarm for f in over[-5:])


def test_a_measure_that_the_baseline_lacks_is_left_out() -> None:
    window = Window(4, 0.01, {"refusal": [0.0] * 4})
    found = [f for _ in range(4) for f in window.add({"refusal": 1.0, "toxicity": 1.0})]
    assert [f.measure for f in found] == ["refusal"]


def test_repetition() -> None:
    assert repeats("one two three") == repeats("a b c d e") == 0.0
    assert repeats("a b c d a b c d") == pytest.approx(1 - 4 / 5)
    assert repeats("no " * 100) == pytest.approx(1 - 1 / 97)
