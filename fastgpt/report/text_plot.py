"""A plot of lines in characters: dots of Braille patterns, or asterisks where the output is not UTF-8."""

from __future__ import annotations

from collections.abc import Sequence

from fastgpt.core.page import number

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a Braille cell, by row and column
LABEL = 9  # characters left of the plot


def plot(
    line: Sequence[tuple[float, float]],
    marks: Sequence[tuple[float, float]],
    width: int,
    height: int,
    plain: bool = False,
) -> list[str]:
    """Return `height` lines of text, at most `width` wide, with the points of `line`, and "o" for each of `marks`.

    Args:
        line, marks: (x, y), finite; the x of `line` in ascending order.
        plain: use ASCII alone.
    """
    columns, (across, down) = max(8, width - LABEL - 1), (1, 1) if plain else (2, 4)
    both = [*line, *marks]
    if not both:
        return []
    x_low, x_high, y_low, y_high = _range([x for x, _ in both]) + _range([y for _, y in both])

    def cell(x: float, y: float) -> tuple[int, int]:
        """Return column and row in dots."""
        right, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return round(right * (columns * across - 1)), round((1 - up) * (height * down - 1))

    bits = [[0] * columns for _ in range(height)]
    for x, y in _dense([cell(x, y) for x, y in line]):
        bits[y // down][x // across] |= DOTS[y % down][x % across]
    rows = [[(" *"[bool(b)] if plain else chr(0x2800 + b) if b else " ") for b in row] for row in bits]
    for x, y in (cell(x, y) for x, y in marks):
        rows[y // down][x // across] = "o"
    labels = {0: number(y_high), height - 1: number(y_low), height // 2: number((y_low + y_high) / 2)}
    edge = "|" if plain else "│"
    return [f"{labels.get(i, ''):>{LABEL}}{edge}{''.join(row).rstrip()}" for i, row in enumerate(rows)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and the highest value, apart where they are equal."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - (abs(low) * 0.05 or 1), high + (abs(high) * 0.05 or 1))


def _dense(cells: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the dots of the lines from each cell to the next."""
    found = list(cells[:1])
    for (x0, y0), (x1, y1) in zip(cells, cells[1:]):
        n = max(abs(x1 - x0), abs(y1 - y0), 1)
        found += [(round(x0 + (x1 - x0) * i / n), round(y0 + (y1 - y0) * i / n)) for i in range(1, n + 1)]
    return found
