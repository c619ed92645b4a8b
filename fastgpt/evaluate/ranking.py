"""Strengths of models from comparisons of pairs: the model of Bradley and Terry, on Elo's scale.

    P(i beats j) = 1 / (1 + 10^((s_j - s_i) / 400))        400 points: odds of 10 to 1; the mean is 1500

A tie is half a win for both sides. One more tie is added to each pair of models that was compared, so that a model that
won all its comparisons has a finite strength. Sources: Bradley and Terry 1952; Hunter 2004 (the iteration).
"""

from __future__ import annotations

import numpy as np

SCALE, MEAN = 400 / np.log(10), 1500.0
STEPS = 10_000


def strengths(wins: np.ndarray) -> np.ndarray:
    """Return the maximum-likelihood strengths, (models,), in Elo points.

    Args:
        wins: wins[i, j] is how often i beat j, ties counted by half, (models, models). Every model must be connected
            with every other by comparisons.
    """
    games = wins + wins.T
    wins = wins + 0.5 * (games > 0)
    games = wins + wins.T
    p = np.ones(len(wins))
    for _ in range(STEPS):
        old = p
        p = wins.sum(1) / (games / (old[:, None] + old[None, :])).sum(1)
        p /= np.exp(np.log(p).mean())
        if np.abs(np.log(p / old)).max() < 1e-9:
            break
    return MEAN + SCALE * np.log(p)


def groups(games: np.ndarray) -> list[list[int]]:
    """Return the models that comparisons connect, directly or through others."""
    left, found = set(range(len(games))), []
    while left:
        group, edge = set(), {min(left)}
        while edge:
            group |= edge
            edge = {int(j) for i in edge for j in np.flatnonzero(games[i])} - group
        found.append(sorted(group))
        left -= group
    return found


def intervals(
    wins: np.ndarray, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the lower and the upper ends of the strengths' intervals, (models,) each, from a bootstrap of the units.
    Resamples in which a model is not connected are drawn again. None if there is one unit.

    Args:
        wins: of each unit, as for `strengths`, (units, models, models). All comparisons of a prompt are one unit.
    """
    if len(wins) < 2:
        return None
    rng, found = np.random.default_rng(seed), []
    for _ in range(20 * resamples):
        total = wins[rng.integers(0, len(wins), len(wins))].sum(0)
        if len(groups(total + total.T)) == 1:
            found.append(strengths(total))
        if len(found) == resamples:
            break
    if len(found) < resamples:
        return None
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high
