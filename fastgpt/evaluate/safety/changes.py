"""Each figure of two evaluations side by side, with an interval of its change: paired by item where items are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.evaluate.paired import OVERALL, Row, compare, name_of
from fastgpt.evaluate.results import Figure, Results
from fastgpt.evaluate.safety.statistics import Z


@dataclass(frozen=True)
class Change:
    """A figure before and after.

    Attributes:
        row: its comparison by item; None where no items are kept for it.
        low, high: 95 % interval of the change; without items that of two independent means; None where there is none.
    """

    before: Figure
    after: Figure
    row: Row | None
    low: float | None
    high: float | None

    @property
    def values(self) -> tuple[float, float]:
        """The figure before and after; over the items that both have, if it is paired."""
        return (self.before.value, self.after.value) if self.row is None else (self.row.a, self.row.b)

    @property
    def value(self) -> float:
        """The change."""
        return self.values[1] - self.values[0]

    @property
    def verdict(self) -> str:
        """better, worse or differs by the paired test, corrected for the number of tests; else empty."""
        return "" if self.row is None else self.row.verdict

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        r = self.row
        return {
            "task": self.before.task,
            "metric": self.before.metric,
            "before": self.values[0],
            "after": self.values[1],
            "change": self.value,
            "low": self.low,
            "high": self.high,
            "paired": r is not None,
            "n": self.before.n if r is None else r.n,
            "p_holm": None if r is None else r.p_holm,
            "verdict": self.verdict,
        }


def is_part(change: Change) -> bool:
    """Return whether a figure is of a category, as "bbq.ambiguous/Age"."""
    return "/" in change.before.task


def changes_of(before: Results, after: Results) -> list[Change]:
    """Return the figures that both evaluations have, in the order of the first.

    Raises:
        UserError: there is none.
    """
    paired: dict[tuple[str, str], Row] = {}
    if {(i.task, i.metric) for i in before.items} & {(i.task, i.metric) for i in after.items}:
        paired = {(r.task, r.metric): r for r in compare(before, after).rows if r.task != OVERALL}
    found = []
    for figure in before.figures:
        other = after.figure(figure.task, figure.metric)
        if other is not None:
            row = paired.get((figure.task, figure.metric))
            low, high = (row.low, row.high) if row is not None else _apart(figure, other)
            found.append(Change(figure, other, row, low, high))
    if not found:
        raise UserError(
            f"{name_of(before)} and {name_of(after)} have no figure in common, expected one preset for both"
        )
    return found


def _apart(a: Figure, b: Figure) -> tuple[float | None, float | None]:
    """Return the interval of the difference of two independent means."""
    if a.stderr is None or b.stderr is None:
        return None, None
    reach = Z * math.hypot(a.stderr, b.stderr)
    return b.value - a.value - reach, b.value - a.value + reach
