"""Agreement between raters: Krippendorff's alpha for nominal values, by the package `krippendorff`.

    alpha = 1 - observed disagreement / disagreement expected by chance

1 is perfect agreement, 0 that of chance. Source: Krippendorff, Content Analysis (2004), chapter 11.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastgpt.core.errors import UserError


@dataclass(frozen=True)
class Agreement:
    """Krippendorff's alpha.

    Attributes:
        alpha: None if it is undefined: no unit has two ratings, or all ratings of such units are the same.
        low, high: interval from a bootstrap of the units; None if alpha is undefined in most of the resamples.
        units: with two ratings or more, the only ones that count.
    """

    alpha: float | None
    low: float | None
    high: float | None
    units: int


def krippendorff_alpha(
    counts: np.ndarray, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Agreement:
    """Return the agreement of raters.

    Args:
        counts: how many raters gave each value to each unit, (units, values), whole numbers.

    Raises:
        UserError: the package krippendorff is not installed.
    """
    try:
        import krippendorff
    except ImportError:
        raise UserError("agreement needs krippendorff, expected `pip install fastgpt[eval]`") from None
    counts = counts[counts.sum(1) >= 2]
    rng = np.random.default_rng(seed)

    def alpha(table: np.ndarray) -> float | None:
        if (table.sum(0) > 0).sum() < 2:
            return None
        return float(krippendorff.alpha(value_counts=table, level_of_measurement="nominal"))

    value = alpha(counts) if len(counts) else None
    if value is None:
        return Agreement(None, None, None, len(counts))
    drawn = [alpha(counts[rng.integers(0, len(counts), len(counts))]) for _ in range(resamples)]
    values = [v for v in drawn if v is not None]
    if len(counts) < 2 or 2 * len(values) < resamples:
        return Agreement(value, None, None, len(counts))
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Agreement(value, float(low), float(high), len(counts))
