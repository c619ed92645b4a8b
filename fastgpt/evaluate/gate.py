"""A gate: whether an evaluation is significantly worse than one that it is held against."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fastgpt.core.errors import counted
from fastgpt.evaluate.paired import Options, Row, common, keys, name_of, shots_that_differ, weights_differ
from fastgpt.evaluate.results import Results


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
