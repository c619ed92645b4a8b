"""Figures of a run of any length in bounded memory: consecutive rows share a bucket, whose extremes are kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

MOST = 400


class Point(NamedTuple):
    """The figures of a bucket of rows: the mean of their steps, and mean, lowest and highest of a figure."""

    step: float
    mean: float
    low: float
    high: float


class Buckets:
    """Rows in at most `most` (even) buckets, each of `width` rows; the last may have fewer. When they are full, pairs
    of them are merged and the width doubles.

    Attributes:
        ends: (step, tokens, seconds) of the last row of each bucket.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most, self.width, self._room = most, 1, 0
        self.ends: list[tuple[float, float, float]] = []
        self._steps: list[list[float]] = []  # rows, sum of their steps
        self._cells: list[dict[str, list[float]]] = []  # name -> values, sum, lowest, highest

    def put(self, end: tuple[float, float, float], figures: Mapping[str, float]) -> None:
        """Add the finite figures of a row."""
        if not self._room:
            if len(self.ends) == self.most:
                self._merge()
            self.ends.append(end)
            self._steps.append([0, 0.0])
            self._cells.append({})
            self._room = self.width
        self._room -= 1
        self.ends[-1] = end
        self._steps[-1][0] += 1
        self._steps[-1][1] += end[0]
        cells = self._cells[-1]
        for name, value in figures.items():
            cell = cells.get(name)
            if cell is None:
                cells[name] = [1, value, value, value]
            else:
                cell[0] += 1
                cell[1] += value
                if value < cell[2]:
                    cell[2] = value
                elif value > cell[3]:
                    cell[3] = value

    def cut(self, step: float) -> int:
        """Drop the buckets that reach `step`, from which a run has begun again; return how many rows they had."""
        rows = 0
        while self.ends and self.ends[-1][0] >= step:
            rows += int(self._steps.pop()[0])
            self.ends.pop()
            self._cells.pop()
            self._room = 0
        return rows

    def _merge(self) -> None:
        self.width *= 2
        self.ends = self.ends[1::2]
        self._steps = [[a[0] + b[0], a[1] + b[1]] for a, b in zip(self._steps[::2], self._steps[1::2])]
        for left, right in zip(self._cells[::2], self._cells[1::2]):
            for name, (n, total, low, high) in right.items():
                a = left.setdefault(name, [0, 0.0, math.inf, -math.inf])
                a[:] = a[0] + n, a[1] + total, min(a[2], low), max(a[3], high)
        self._cells = self._cells[::2]

    def points(self, name: str) -> Iterator[Point]:
        """Yield a figure's points in the order of the rows; a bucket without a value is left out."""
        for (rows, steps), cells in zip(self._steps, self._cells):
            if name in cells:
                n, total, low, high = cells[name]
                yield Point(steps / rows, total / n, low, high)


def figures_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a row by name, without its step."""
    return {
        name: value
        for name, value in row.items()
        if name != "step" and isinstance(value, (int, float)) and math.isfinite(value)
    }
