"""Intervals and tests of paired values: against scipy, against values computed by hand, and by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from fastgpt.evaluate.statistics import (
    Pairs,
    agresti_min_interval,
    bootstrap_interval,
    holm,
    mcnemar,
    resampled_means,
    sign_flip,
)

Draw = Callable[[np.random.Generator, int], Pairs]


def shares(above: int, below: int, n: int) -> Pairs:
    """Return pairs of values 0 and 1: b is higher in `above` of n items and lower in `below`."""
    return Pairs(np.repeat([1.0, -1.0, 0.0], [above, below, n - above - below]), binary=True)


def test_mcnemar_by_hand() -> None:
    # 1 of 7: (1 + 7) / 128
    assert mcnemar(shares(1, 6, 20)) == (0.125, 0.0625, 127 / 128)
    assert mcnemar(shares(0, 0, 5)) == (1.0, 1.0, 1.0)
    assert mcnemar(shares(1, 0, 1)) == (1.0, 1.0, 0.5)


@pytest.mark.parametrize(("above", "below"), [(0, 5), (3, 3), (4, 11), (120, 90), (2000, 2200)])
def test_mcnemar_against_scipy(above: int, below: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    p = mcnemar(shares(above, below, 5000))
    found = [stats.binomtest(above, above + below, 0.5, way).pvalue for way in ("two-sided", "less", "greater")]
    assert p == pytest.approx(found, rel=1e-9)


def test_agresti_min_by_hand() -> None:
    # cells 4.5 and 1.5 of 12: difference 0.25, variance (0.5 - 0.0625) / 12
    reach = 1.959963984540054 * math.sqrt(0.4375 / 12)
    assert agresti_min_interval(shares(4, 1, 10), 0.95) == pytest.approx((0.25 - reach, 0.25 + reach))
    low, high = agresti_min_interval(shares(0, 0, 1000), 0.95)
    assert low == -high and 0.001 < high < 0.004  # about 3 / n: no item differs, yet the difference is not known


def test_sign_flip_is_mcnemar_for_zeros_and_ones() -> None:
    pairs = shares(2, 7, 12)
    assert sign_flip([pairs], [1.0], 1000, np.random.default_rng(0)) == pytest.approx(mcnemar(pairs))


def test_sign_flip_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    d = np.random.default_rng(3).normal(0.4, 1, 10)
    for way, p in zip(("two-sided", "less", "greater"), sign_flip([Pairs(d)], [1.0], 1024, np.random.default_rng(0))):
        found = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=math.inf, alternative=way)
        assert p == pytest.approx(found.pvalue)


def test_drawn_flips_agree_with_all_flips() -> None:
    d = np.random.default_rng(4).normal(0.5, 1, 12)
    exact = sign_flip([Pairs(d)], [1.0], 4096, np.random.default_rng(0))
    drawn = sign_flip([Pairs(d)], [1.0], 4095, np.random.default_rng(0))
    d = np.repeat(d - d.mean() + 0.05, 30)
    few = sign_flip([Pairs(d)], [1.0], 20_000, np.random.default_rng(0))  # few values: binomial counts
    many = sign_flip([Pairs(d + 1e-9 * np.arange(360))], [1.0], 20_000, np.random.default_rng(0))
    for p, q, n in [*zip(exact, drawn, [4095] * 3), *zip(few, many, [10_000] * 3)]:
        assert p != q and abs(p - q) < 5 * math.sqrt(p * (1 - p) / n)


def test_bootstrap_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    a, b = rng.exponential(1, 40), rng.exponential(1.3, 40)
    ours = bootstrap_interval([Pairs(b - a)], [1.0], 0.9, 20_000, np.random.default_rng(0))
    found = stats.bootstrap(
        (b, a), lambda x, y, axis: np.mean(x - y, axis), paired=True, confidence_level=0.9, n_resamples=20_000, rng=rng,
        method="percentile",
    )  # fmt: skip
    mean, root = (b - a).mean(), math.sqrt(40 / 39)
    wide = [mean + root * (end - mean) for end in found.confidence_interval]
    assert ours == pytest.approx(wide, abs=0.02 * (b - a).std())  # 6 standard errors of such a quantile


@pytest.mark.parametrize("weighted", [False, True])
def test_bootstrap_variance_is_that_of_the_mean(weighted: bool) -> None:
    rng = np.random.default_rng(2)
    d, w = rng.normal(0, 1, 8), rng.uniform(0.9, 1.1, 8) if weighted else None
    means = resampled_means(Pairs(d, w), 40_000, rng)
    assert means.std() == pytest.approx(d.std(ddof=1) / math.sqrt(8), rel=0.05 if weighted else 0.02)


def test_few_values_are_drawn_as_counts() -> None:
    d = np.repeat([1.0, -1.0, 0.0], [90, 30, 180])
    few = resampled_means(Pairs(d), 20_000, np.random.default_rng(0))
    many = resampled_means(Pairs(d + 1e-9 * np.arange(300)), 20_000, np.random.default_rng(0))
    for q in (0.025, 0.5, 0.975):
        assert abs(np.quantile(few, q) - np.quantile(many, q)) <= 0.0034  # one item


def test_weights_make_a_ratio_of_sums() -> None:
    pairs = Pairs(np.array([1.0, 0.0]), np.array([3.0, 1.0]))
    assert pairs.mean == 0.75
    low, high = bootstrap_interval([pairs], [1.0], 0.99, 1000, np.random.default_rng(0)) or (0, 0)
    assert (low, high) == pytest.approx((0.75 - math.sqrt(2) * 0.75, 0.75 + math.sqrt(2) * 0.25))


def test_one_item_has_no_bootstrap_interval() -> None:
    one, rng = Pairs(np.array([0.3])), np.random.default_rng(0)
    assert bootstrap_interval([one], [1.0], 0.95, 100, rng) is None
    assert bootstrap_interval([Pairs(np.zeros(5)), one], [0.5, 0.5], 0.95, 100, rng) is None
    assert sign_flip([one], [1.0], 100, rng) == (1.0, 1.0, 0.5)


def test_thousands_of_items() -> None:
    d = np.random.default_rng(9).normal(0.05, 1, 3000)
    p = sign_flip([Pairs(d)], [1.0], 2000, np.random.default_rng(0))
    z = d.mean() / math.sqrt((d**2).sum()) * len(d)
    normal = math.erfc(abs(z) / math.sqrt(2))
    assert abs(p.two_sided - normal) < 5 * math.sqrt(normal / 2000)


def test_equal_values() -> None:
    same, rng = Pairs(np.zeros(7)), np.random.default_rng(0)
    assert bootstrap_interval([same], [1.0], 0.95, 100, rng) == (0.0, 0.0)
    assert sign_flip([same], [1.0], 100, rng) == (1.0, 1.0, 1.0)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def normal(rng: np.random.Generator, n: int) -> Pairs:
    return Pairs(rng.normal(0, 1, n))


def skewed(rng: np.random.Generator, n: int) -> Pairs:
    return Pairs(rng.exponential(1, n) - 1)


def ratio(rng: np.random.Generator, n: int) -> Pairs:
    return Pairs(rng.normal(0, 1, n), rng.uniform(1, 9, n))


def coin(rng: np.random.Generator, n: int) -> Pairs:
    return Pairs(rng.choice([1.0, -1.0, 0.0], n, p=[0.06, 0.06, 0.88]), binary=True)


SIMULATED: list[tuple[Draw, int, float]] = [  # (differences of mean 0, items, coverage of 95 % intervals at least)
    (normal, 12, 0.90),  # P(|t| < 1.96) is 0.924 for 11 degrees of freedom; 4 standard errors less
    (normal, 100, 0.935),
    (skewed, 100, 0.92),
    (ratio, 60, 0.925),
    (coin, 30, 0.935),
    (coin, 300, 0.935),
]


@pytest.mark.slow
@pytest.mark.parametrize(("draw", "n", "least"), SIMULATED)
def test_coverage_and_error_rate(draw: Draw, n: int, least: float) -> None:
    rng, runs = np.random.default_rng(5), 2000
    covered = rejected = worse = 0
    for _ in range(runs):
        pairs = draw(rng, n)
        if pairs.binary:
            interval, p = agresti_min_interval(pairs, 0.95), mcnemar(pairs)
        else:
            interval = bootstrap_interval([pairs], [1.0], 0.95, 400, rng) or (0, 0)
            p = sign_flip([pairs], [1.0], 400, rng)
        covered += interval[0] <= 0 <= interval[1]
        rejected += p.two_sided <= 0.05
        worse += p.lower <= 0.05
    error = 4 * math.sqrt(0.05 * 0.95 / runs)
    assert least <= covered / runs <= 0.95 + 2 * error
    assert rejected / runs <= 0.05 + error
    if draw is not skewed:  # one-sided, the signs of skewed differences are no fair coins until n is large
        assert worse / runs <= 0.05 + error


@pytest.mark.slow
def test_coverage_of_the_mean_over_tasks() -> None:
    rng, runs, sizes, means = np.random.default_rng(6), 1000, (15, 40, 200), (0.1, -0.2, 0.0)
    covered = 0
    for _ in range(runs):
        strata = [Pairs(rng.normal(m, 1 + k, n)) for k, (n, m) in enumerate(zip(sizes, means))]
        low, high = bootstrap_interval(strata, [1 / 3] * 3, 0.95, 400, rng) or (0, 0)
        covered += low <= sum(means) / 3 <= high
    assert 0.92 <= covered / runs <= 0.98


@pytest.mark.slow
def test_family_wise_error_of_holm() -> None:
    rng, runs = np.random.default_rng(7), 2000
    wrong = sum(min(holm([mcnemar(coin(rng, 200)).lower for _ in range(10)])) <= 0.05 for _ in range(runs))
    assert wrong / runs <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / runs)
