"""A gate: whether an evaluation is significantly worse than one that it is held against."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fastgpt.core.errors import UserError, counted
from fastgpt.evaluate.paired import (
    Comparison,
    Options,
    Row,
    common,
    compare,
    keys,
    name_of,
    shots_that_differ,
    weights_differ,
)
from fastgpt.evaluate.results import Results


@dataclass(frozen=True)
class Verdict:
    """What a gate found: the comparison, the rows that were tested, and those of them that became worse."""

    comparison: Comparison
    tested: list[Row]
    failed: list[Row]


def held_against(
    base: Results, new: Results, options: Options, alpha: float, min_difference: float, names: tuple[str, str]
) -> Verdict:
    """Hold an evaluation against a base; a gate passes if no row failed.

    Args:
        alpha: chance of a failed row although nothing became worse.
        min_difference: smaller regressions pass, in the unit of the metric.
        names: of base and new, for messages.

    Raises:
        UserError: they cannot be compared item by item, or there is nothing to test.
    """
    if reasons := different(base, new, options):
        raise UserError(f"{names[1]} cannot be held against {names[0]}: {'; '.join(reasons)}")
    comparison = compare(base, new, options)
    tested = [r for r in comparison.rows if r.p_worse is not None]
    if not tested:
        raise UserError(f"{names[0]} has no metric with a better direction and items, expected one or more to test")
    return Verdict(comparison, tested, failures(comparison.rows, alpha, min_difference))


def failures(rows: Sequence[Row], alpha: float, min_difference: float) -> list[Row]:
    """Return the rows in which b is worse: the one-sided p-value, corrected by Holm, is at most alpha, and the
    difference is at least min_difference."""
    return [
        r
        for r in rows
        if r.p_worse_holm is not None and r.p_worse_holm <= alpha and abs(r.difference) >= min_difference
    ]


def different(base: Results, new: Results, options: Options) -> list[str]:
    """Return what keeps the evaluations from being compared item by item, one reason for each task and metric."""
    reasons = [*shots_that_differ(base, new)]
    theirs = {(i.task, i.metric): i for i in new.items}
    for one in base.items:
        where = f"{one.task} {one.metric}"
        if options.metrics and one.metric not in options.metrics:
            continue
        other = theirs.get((one.task, one.metric))
        if other is None:
            reasons.append(f"{where} has no items of {name_of(new)}")
            continue
        left, right = Counter(keys(one)), Counter(keys(other))
        if left != right:
            alone = [(left - right).total(), (right - left).total()]
            reasons.append(f"{where}: {counted(alone[0], 'item')} only in the base, {alone[1]} only in the new one")
        elif weights_differ(one, other, common(one, other)):
            reasons.append(f"{where}: its weights differ, as with another tokenizer")
    return reasons
