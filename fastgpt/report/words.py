"""Numbers as a page and the terminal show them."""

from __future__ import annotations

import math


def duration(seconds: float | None) -> str:
    """Return a time in words: "45 s", "12 min", "3 h 05 min", "2 d 4 h"; "-" if it is not known."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def digits(value: object) -> str:
    """Return a loss or another figure with four decimals, fewer if it is large, three significant digits if it is tiny;
    "-" if it is no number."""
    if not isinstance(value, (int, float)):
        return "-"
    if 1000 <= abs(value) < math.inf:
        return f"{value:,.0f}"
    return f"{value:.3g}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"
