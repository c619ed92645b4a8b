"""Two evaluations side by side: the difference of each metric over the items that both have, with its interval and
test, and the mean over tasks."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from fastgpt.core.errors import UserError, counted
from fastgpt.evaluate import statistics
from fastgpt.evaluate.results import Figure, Items, Results
from fastgpt.evaluate.statistics import Pairs, agresti_min_interval, bootstrap_interval, holm, sign_flip

OVERALL = "overall"
NAMED = 8  # of what is not compared


@dataclass(frozen=True)
class Options:
    """How to compare.

    Attributes:
        metrics: those to compare; empty: all.
        weight: "task" or "item": what counts equally in the overall mean.
        confidence: of the intervals.
        resamples: of the bootstrap and of the sign-flip test.
        seed: of both.
    """

    metrics: tuple[str, ...] = ()
    weight: str = "task"
    confidence: float = 0.95
    resamples: int = 10_000
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """A metric of a task, or its mean over tasks, of two models.

    Attributes:
        task, metric: as in `Figure`; the mean over tasks has task "overall".
        n: items that both have.
        only_a, only_b: items that one of them has alone.
        a, b: means over the n items.
        difference: b - a.
        low, high: its interval; None where it has none, as for one item.
        above, below: items with a higher and a lower value in b.
        p: two-sided; p_holm: corrected for the number of rows.
        p_worse: one-sided, for b being worse; None if the metric has no better direction. p_worse_holm: corrected.
        test: "McNemar" or "sign flip".
        higher_is_better: as in `Figure`.
    """

    task: str
    metric: str
    n: int
    only_a: int
    only_b: int
    a: float
    b: float
    difference: float
    low: float | None
    high: float | None
    above: int
    below: int
    p: float
    p_worse: float | None
    test: str
    higher_is_better: bool | None
    p_holm: float = 1.0
    p_worse_holm: float | None = None

    @property
    def verdict(self) -> str:
        """What the corrected p-value says at 5 %, from the point of view of b."""
        if self.p_holm > 0.05:
            return ""
        if self.higher_is_better is None:
            return "differs"
        return "better" if (self.difference > 0) == self.higher_is_better else "worse"


@dataclass
class Comparison:
    """Rows of all metrics of all tasks, then of means over tasks; and what the reader has to know."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare(a: Results, b: Results, options: Options = Options()) -> Comparison:
    """Compare two evaluations.

    Raises:
        UserError: nothing can be compared, a value is not finite, or a metric of `options` is nowhere.
    """
    require_metrics(options.metrics, [*a.items, *b.items])
    notes = [*shots_that_differ(a, b), *_without_items(a, b, options)]
    rows: list[Row] = []
    strata: dict[tuple[str, str], Pairs] = {}
    for one, other in both(a, b, options):
        ids = common(one, other)
        where = f"{one.task} {one.metric}"
        if not ids:
            notes.append(f"{where}: no item is in both, so it is not compared")
        elif weights_differ(one, other, ids):
            notes.append(f"{where}: its weights differ, as with another tokenizer, so it is not compared")
        else:
            if direction_of(a, one) is None and not is_mean(a, one):
                notes.append(f"{where}: the figure is not the mean over items, which is compared")
            rows.append(_row(one, other, ids, direction_of(a, one), options, strata))
    if not rows:
        why = f": {notes[0]}" if notes else ""
        raise UserError(f"{name_of(a)} and {name_of(b)} have no metric with items in both{why}")
    rows += _overall(rows, strata, options)
    return Comparison(_corrected(rows), notes)


def both(a: Results, b: Results, options: Options) -> Iterator[tuple[Items, Items]]:
    """Yield the items of each metric that both evaluations have and the options ask for."""
    theirs = {(i.task, i.metric): i for i in b.items}
    for one in a.items:
        other = theirs.get((one.task, one.metric))
        if other is not None and (not options.metrics or one.metric in options.metrics):
            yield one, other


def name_of(results: Results) -> str:
    """Return how to call the model of an evaluation."""
    step = results.model.get("step")
    return str(results.model.get("name", "a model")) + (f" at step {step}" if step is not None else "")


def require_metrics(metrics: Iterable[str], items: Iterable[Items]) -> None:
    """Refuse a metric that no items have.

    Raises:
        UserError: names it, and those there are.
    """
    there = sorted({i.metric for i in items})
    for metric in metrics:
        if metric not in there:
            raise UserError(f"metric {metric!r} has no items, expected one of {', '.join(there) or '(there are none)'}")


def keys(items: Items) -> list[tuple[str, int]]:
    """Return what tells items apart: the id, and how often it came before."""
    seen: Counter[str] = Counter()
    found = []
    for i in items.ids:
        found.append((i, seen[i]))
        seen[i] += 1
    return found


def common(a: Items, b: Items) -> list[tuple[int, int]]:
    """Return the positions in a and in b of the items that both have, in the order of a."""
    places = {key: i for i, key in enumerate(keys(b))}
    return [(i, places[key]) for i, key in enumerate(keys(a)) if key in places]


def weights_differ(a: Items, b: Items, ids: list[tuple[int, int]]) -> bool:
    """Return whether an item has another weight on each side, so that the means are of different things.

    Raises:
        UserError: as `values_of`.
    """
    for items in (a, b):
        values_of(items)
    if a.weights is None or b.weights is None:
        return a.weights is not b.weights
    return any(a.weights[i] != b.weights[j] for i, j in ids)


def is_mean(results: Results, items: Items) -> bool:
    """Return whether the figure is the mean of the items, so that its direction is theirs; a metric without a figure
    has nothing to differ from."""
    figure = results.figure(items.task, items.metric)
    if figure is None:
        return True
    mean = float(np.average(values_of(items), weights=items.weights))
    return math.isclose(mean, figure.value, rel_tol=1e-6, abs_tol=1e-9)


def direction_of(results: Results, items: Items) -> bool | None:
    """Return whether a higher value of the items is better; None: neither, or unknown."""
    figure = results.figure(items.task, items.metric)
    return figure.higher_is_better if figure is not None and is_mean(results, items) else None


def values_of(items: Items) -> np.ndarray:
    """Return the values, (n,) fp64.

    Raises:
        UserError: a value is not finite, a weight is not positive, or their number is not that of the ids.
    """
    where = f"{items.task} {items.metric}"
    values = np.asarray(items.values, dtype=np.float64)
    weights = np.ones(len(values)) if items.weights is None else np.asarray(items.weights, dtype=np.float64)
    if not len(values) == len(items.ids) == len(weights) > 0:
        counts = f"{len(items.ids)} ids, {len(values)} values and {len(weights)} weights"
        raise UserError(f"{where}: got {counts}, expected equally many, one or more")
    if wrong := int((~np.isfinite(values)).sum()):
        raise UserError(f"{where}: got {counted(wrong, 'value')} without a finite number, expected finite numbers")
    if wrong := int((~((weights > 0) & (weights < math.inf))).sum()):
        raise UserError(f"{where}: got {counted(wrong, 'weight')} of 0 or less, or infinite, expected positive numbers")
    return values


def _row(
    one: Items,
    other: Items,
    ids: list[tuple[int, int]],
    higher: bool | None,
    options: Options,
    strata: dict[tuple[str, str], Pairs],
) -> Row:
    """Return the row of a task; its pairs are kept in `strata`."""
    left, right = np.array(ids).T
    a, b = values_of(one)[left], values_of(other)[right]
    w = None if one.weights is None else np.asarray(one.weights, dtype=np.float64)[left]
    pairs = Pairs(b - a, w, w is None and bool(np.isin([a, b], (0.0, 1.0)).all()))
    strata[one.task, one.metric] = pairs
    means = (float(np.average(v, weights=w)) for v in (a, b))
    alone = (len(one.ids) - len(ids), len(other.ids) - len(ids))
    return _tested(one.task, one.metric, alone, means, [pairs], [1.0], higher, options)


def _overall(rows: list[Row], strata: dict[tuple[str, str], Pairs], options: Options) -> list[Row]:
    """Return the mean over tasks of each metric that two or more tasks have."""
    found = []
    for metric in dict.fromkeys(r.metric for r in rows):
        parts = [r for r in rows if r.metric == metric]
        if len(parts) < 2:
            continue
        items = sum(r.n for r in parts)
        shares = [1 / len(parts) if options.weight == "task" else r.n / items for r in parts]
        means = (sum(s * v for s, v in zip(shares, values)) for values in zip(*((r.a, r.b) for r in parts)))
        directions = {r.higher_is_better for r in parts}
        higher = directions.pop() if len(directions) == 1 else None
        pairs = [strata[r.task, metric] for r in parts]
        alone = (sum(r.only_a for r in parts), sum(r.only_b for r in parts))
        found.append(_tested(OVERALL, metric, alone, means, pairs, shares, higher, options))
    return found


def _tested(
    task: str,
    metric: str,
    alone: tuple[int, int],
    means: Iterable[float],
    strata: list[Pairs],
    shares: list[float],
    higher: bool | None,
    options: Options,
) -> Row:
    """Return a row with its interval and p-values; its random numbers do not depend on the other rows."""
    rng = np.random.default_rng([options.seed, zlib.crc32(f"{task}\n{metric}".encode())])
    mcnemar = len(strata) == 1 and strata[0].binary
    interval: tuple[float, float] | None
    if mcnemar:
        interval, p = agresti_min_interval(strata[0], options.confidence), statistics.mcnemar(strata[0])
    else:
        interval = bootstrap_interval(strata, shares, options.confidence, options.resamples, rng)
        p = sign_flip(strata, shares, options.resamples, rng)
    a, b = means
    low, high = interval or (None, None)
    above, below = (sum(int((s * p.differences > 0).sum()) for p in strata) for s in (1, -1))
    return Row(
        task=task,
        metric=metric,
        n=sum(p.n for p in strata),
        only_a=alone[0],
        only_b=alone[1],
        a=a,
        b=b,
        difference=sum(s * p.mean for s, p in zip(shares, strata)),
        low=low,
        high=high,
        above=above,
        below=below,
        p=p.two_sided,
        p_worse=None if higher is None else p.lower if higher else p.higher,
        test="McNemar" if mcnemar else "sign flip",
        higher_is_better=higher,
    )


def _corrected(rows: list[Row]) -> list[Row]:
    """Return the rows with Holm's correction over all of them."""
    two_sided = holm([r.p for r in rows])
    directed = [i for i, r in enumerate(rows) if r.p_worse is not None]
    worse = dict(zip(directed, holm([rows[i].p_worse or 0.0 for i in directed])))
    return [replace(r, p_holm=two_sided[i], p_worse_holm=worse.get(i)) for i, r in enumerate(rows)]


def shots_that_differ(a: Results, b: Results) -> list[str]:
    """Return a sentence for each task that was asked with another number of examples."""
    theirs = {f.task: f.shots for f in b.figures}
    ours = {f.task: f.shots for f in a.figures}
    return [
        f"{task}: prompts of {name_of(a)} have {counted(shots, 'example')}, those of {name_of(b)} {theirs[task]}"
        for task, shots in ours.items()
        if theirs.get(task, shots) != shots
    ]


def _without_items(a: Results, b: Results, options: Options) -> list[str]:
    """Return what is not compared because one side lacks it, or it has no values per item.

    The parts of a task, as "mmlu/stem", are compared with it.
    """
    compared = {(one.task, one.metric) for one, _ in both(a, b, options)}
    named: list[Figure | Items] = [*a.figures, *b.figures, *a.items, *b.items]
    found = dict.fromkeys((f.task, f.metric) for f in named)
    left = [
        f"{t} {m}"
        for t, m in found
        if (t.split("/")[0], m) not in compared and (not options.metrics or m in options.metrics)
    ]
    more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
    return (
        [f"not compared, because not both sides have a value for each item: {', '.join(left[:NAMED])}{more}"]
        if left
        else []
    )
