"""How many items tell two models apart, and the smallest difference that a number of items shows.

Both models answer the same items. d is the true difference of their means, z the sum of the quantiles of the test's
level (two-sided) and of its power:

    accuracy   items on which exactly one of the two is right have the share s (discordant);
               sqrt(n) = (z + sqrt(z^2 + 4 d)) / (2 d),  z = z_alpha sqrt(s) + z_power sqrt(s - d^2)
    means      the difference of an item has the standard deviation s: n = (z s / d)^2

The first is McNemar's test with a continuity correction, which is close to the exact test of `fastgpt eval compare`;
without the correction it is Connor's formula. Sources: Connor, Biometrics 43 (1987); Levin and Chen, The American
Statistician 53 (1999).
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist

import numpy as np

from fastgpt.core.command import Parser, number
from fastgpt.core.errors import UserError
from fastgpt.evaluate.paired import common
from fastgpt.evaluate.results import Items, load_results

ALPHA, POWER = 0.05, 0.8
DISCORDANT = (0.1, 0.2, 0.4)  # shares of a table without measurements
DIFFERENCES = (0.01, 0.02, 0.05, 0.1)
SIZES = (100, 300, 1000, 3000)


def _quantiles(alpha: float, power: float) -> tuple[float, float]:
    normal = NormalDist()
    return normal.inv_cdf(1 - alpha / 2), normal.inv_cdf(power)


def items_for_accuracy(difference: float, discordant: float, alpha: float = ALPHA, power: float = POWER) -> int:
    """Return the items that McNemar's test needs.

    Args:
        difference: of the two accuracies, more than 0, at most `discordant`.
        discordant: share of the items on which exactly one model is right, at most 1.
        alpha: level of the two-sided test.
        power: probability to find the difference.

    Raises:
        ValueError: a number is out of range.
    """
    if not 0 < difference <= discordant <= 1:
        raise ValueError(f"difference is {difference} and discordant {discordant}, expected 0 < difference <= it <= 1")
    level, wanted = _quantiles(alpha, power)
    z = level * math.sqrt(discordant) + wanted * math.sqrt(max(0.0, discordant - difference**2))
    return math.ceil(((z + math.sqrt(z * z + 4 * difference)) / (2 * difference)) ** 2)


def smallest_accuracy_difference(n: int, discordant: float, alpha: float = ALPHA, power: float = POWER) -> float | None:
    """Return the smallest difference of two accuracies that n items show; None if not even `discordant` itself."""
    if items_for_accuracy(discordant, discordant, alpha, power) > n:
        return None
    low, high = 0.0, discordant
    for _ in range(60):  # fewer items are needed for a larger difference
        middle = (low + high) / 2
        low, high = (low, middle) if items_for_accuracy(middle, discordant, alpha, power) <= n else (middle, high)
    return high


def items_for_mean(difference: float, deviation: float, alpha: float = ALPHA, power: float = POWER) -> int:
    """Return the items that a test of a mean difference needs.

    Args:
        difference: of the two means, more than 0.
        deviation: standard deviation of the differences of the items.

    Raises:
        ValueError: a number is not positive.
    """
    if not (difference > 0 and deviation > 0):
        raise ValueError(f"difference is {difference} and deviation {deviation}, expected both above 0")
    return max(2, math.ceil((sum(_quantiles(alpha, power)) * deviation / difference) ** 2))


def smallest_mean_difference(n: int, deviation: float, alpha: float = ALPHA, power: float = POWER) -> float:
    """Return the smallest difference of two means that n items show."""
    return sum(_quantiles(alpha, power)) * deviation / math.sqrt(n)


def spread_of(a: Items, b: Items) -> tuple[str, float, int]:
    """Return "discordant" and the share of the items that differ, if all values are 0 or 1, or else "deviation" and the
    standard deviation of the differences; and the number of items that both have.

    Raises:
        UserError: fewer than two items are in both, or they do not differ at all.
    """
    ids = common(a, b)
    if len(ids) < 2:
        raise UserError(f"{a.task} {a.metric}: {len(ids)} items are in both evaluations, expected at least 2")
    pairs = np.array([[a.values[i], b.values[j]] for i, j in ids])
    differences = pairs[:, 0] - pairs[:, 1]
    if not differences.any():
        raise UserError(f"{a.task} {a.metric}: both models have the same value on every item, expected two models")
    if set(np.unique(pairs)) <= {0.0, 1.0}:
        return "discordant", float((differences != 0).mean()), len(ids)
    return "deviation", float(differences.std(ddof=1)), len(ids)


def lines(
    kind: str, spread: float, items: int | None, difference: float | None, alpha: float, power: float
) -> list[str]:
    """Return sentences about one spread, for a number of items, a difference, or tables of both."""
    named = f"{spread:.1%} of the items discordant" if kind == "discordant" else f"standard deviation {spread:.4g}"
    needed = items_for_accuracy if kind == "discordant" else items_for_mean
    found = []
    unit = 1.0 if kind == "discordant" else spread
    for d in [difference] if difference else [] if items else [d * unit for d in DIFFERENCES]:
        if kind == "discordant" and d > spread:
            found.append(f"{named}: a difference of {d:.4g} is impossible")
        else:
            found.append(f"{named}: a difference of {d:.4g} needs {needed(d, spread, alpha, power):,} items")
    for n in [items] if items else [] if difference else SIZES:
        if kind == "discordant":
            least = smallest_accuracy_difference(n, spread, alpha, power)
        else:
            least = smallest_mean_difference(n, spread, alpha, power)
        shown = "no difference, however large" if least is None else f"a difference of {least:.4f} or more"
        found.append(f"{named}: {n:,} items show {shown}")
    return found


def summary(n: int) -> list[str]:
    """Return what a suite of n items can show of two accuracies."""
    return [line for s in DISCORDANT for line in lines("discordant", s, n, None, ALPHA, POWER)]


def main(argv: list[str]) -> int:
    """Run `fastgpt eval power`."""
    parser = Parser(
        prog="fastgpt eval power",
        description="Print how many items tell two models apart that answer the same items, and the smallest "
        "difference that a number of items shows.",
    )
    parser.add_argument("--difference", type=number(float, 0, open_least=True), help="of accuracies (0 to 1) or means")
    parser.add_argument("--items", type=number(int, 1), metavar="N", help="items of a suite")
    share = number(float, 0, 1, open_least=True)
    parser.add_argument("--discordant", type=share, metavar="SHARE", help="items on which exactly one model is right")
    parser.add_argument(
        "--deviation", type=number(float, 0, open_least=True), metavar="SD", help="of the items' differences of a mean"
    )
    parser.add_argument(
        "--results", nargs=2, type=Path, metavar=("A", "B"), help="measure these on two evaluations instead"
    )
    parser.add_argument("--task", help="of --results (default: all)")
    parser.add_argument("--metric", help="of --results (default: all)")
    parser.add_argument("--alpha", type=number(float, 0, 0.5, open_least=True), default=ALPHA, help="default: 0.05")
    parser.add_argument("--power", type=number(float, 0.5, 0.9999), default=POWER, help="default: 0.8")
    args = parser.parse_args(argv)
    given = [n for n in ("discordant", "deviation", "results") if getattr(args, n) is not None]
    if len(given) > 1:
        raise UserError(f"power: got --{' and --'.join(given)}, expected one of them")
    if (args.task or args.metric) and not args.results:
        raise UserError("power: --task and --metric have no effect without --results")
    if args.discordant and args.difference and args.difference > args.discordant:
        raise UserError(
            f"power: --difference is {args.difference:g}, expected at most --discordant, {args.discordant:g}: "
            "accuracies differ by no more than the share of the items on which exactly one model is right"
        )
    spreads = _spreads(args.results, args.task, args.metric, args.discordant, args.deviation)
    print(f"two models on the same items, two-sided test at {args.alpha:g}, power {args.power:g}")
    for title, kind, spread in spreads:
        print(
            *([title] if title else []),
            *lines(kind, spread, args.items, args.difference, args.alpha, args.power),
            sep="\n",
        )
    return 0


def _spreads(
    results: list[Path] | None, task: str | None, metric: str | None, discordant: float | None, deviation: float | None
) -> list[tuple[str, str, float]]:
    """Return (title, kind, spread) of what the command is asked about."""
    if deviation is not None:
        return [("", "deviation", deviation)]
    if results is None:
        return [("", "discordant", s) for s in ((discordant,) if discordant else DISCORDANT)]
    a, b = (load_results(path) for path in results)
    theirs = {(i.task, i.metric): i for i in b.items}
    found, wrong = [], []
    for one in a.items:
        other = theirs.get((one.task, one.metric))
        if other and task in (None, one.task) and metric in (None, one.metric):
            try:
                kind, spread, n = spread_of(one, other)
            except UserError as e:  # other metrics may have a spread
                wrong.append(e)
                continue
            found.append((f"{one.task} {one.metric}, measured on {n:,} items", kind, spread))
    if not found and wrong:
        raise wrong[0]
    if not found:
        raise UserError(f"{results[0]} and {results[1]} have no items of this task and metric in both")
    return found
