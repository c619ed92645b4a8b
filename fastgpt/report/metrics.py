"""What the rows of a run say: its figures over the steps, the last and the best ones, and steps that were skipped."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from fastgpt.report.series import MOST, Buckets, Point, figures_of
from fastgpt.training.metric import Goal, full_name, goal_of

RECENT = 100  # steps that the present speed and loss are taken from


class Metrics:
    """The metrics of a run.

    Attributes:
        steps: figures of the training steps.
        validations: figures of validations and of the end of a run, by name.
        last: the last row of a step.
        latest: name of a validation's figure -> its last (step, value), which may not be finite.
        recent: the last RECENT rows of steps.
        count, skipped: steps, and those of them that changed nothing; `last_skip`: the last of those.
        joules: energy of all sessions; 0.0 where it was not measured.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most, self.steps = most, Buckets(most)
        self.validations: dict[str, Buckets] = {}
        self.last: dict[str, Any] = {}
        self.latest: dict[str, tuple[int, float]] = {}
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self.count = self.skipped = self.last_skip = self._timed = 0
        self.joules = self.peak_gb = self._token_seconds = 0.0
        self._names: dict[str, None] = {}
        self._extremes: dict[str, list[tuple[float, int]]] = {}  # name -> lowest and highest, with their steps

    def add(self, row: dict[str, Any]) -> None:
        """Add a row of metrics.jsonl."""
        if "loss" in row:
            self._add_step(row)
            return
        step, figures = row["step"], figures_of(row)
        self.joules += figures.get("joules", 0.0)
        wrong = {name: value for name, value in row.items() if isinstance(value, float) and name not in figures}
        self.latest |= {name: (step, value) for name, value in wrong.items()}
        for name, value in figures.items():
            self.latest[name] = step, value
            self.validations.setdefault(name, Buckets(self.most)).put((step, 0, 0), {name: value})
            low, high = self._extremes.setdefault(name, [(value, step), (value, step)])
            self._extremes[name] = [min(low, (value, step)), high if value <= high[0] else (value, step)]

    def _add_step(self, row: dict[str, Any]) -> None:
        figures = figures_of(row)
        if self.last and row["step"] <= self.last["step"]:  # the steps after a checkpoint, again
            self.count -= self.steps.cut(row["step"])
            self.recent = deque((r for r in self.recent if r["step"] < row["step"]), maxlen=RECENT)
        self._names |= {name: None for name in row if name not in ("step", "skipped")}
        self.steps.put((row["step"], row.get("tokens", 0), row.get("seconds", 0)), figures)
        self.last = row
        self.recent.append(row)
        self.count += 1
        speed = figures.get("tokens_per_second", 0.0)
        if speed > 0:
            self._timed, self._token_seconds = self._timed + 1, self._token_seconds + 1 / speed
        self.peak_gb = max(self.peak_gb, figures.get("memory_gb", 0.0))
        if was_skipped(row):
            self.skipped, self.last_skip = self.skipped + 1, row["step"]

    def step_names(self) -> list[str]:
        """Return the names of the figures of steps, in the order of their first rows."""
        return list(self._names)

    def points(self, name: str) -> list[Point]:
        """Return the points of a validation's figure by step; the last row may be of an earlier one, the best."""
        found = self.validations.get(name)
        return [] if found is None else sorted(found.points(name))

    def best(self, settings: Mapping[str, Any]) -> tuple[str, float, int] | None:
        """Return the metric that the settings name, its best value and the step of that; None without validation."""
        metric, goal = settings.get("metric", "val_loss"), settings.get("metric_goal", "auto")
        name = full_name(metric, self._extremes)
        return None if name is None else self._best(name, goal)

    def _best(self, name: str, goal: Goal) -> tuple[str, float, int] | None:
        found = goal_of(name, goal)
        if found is None:
            return None
        value, step = self._extremes[name][found == "max"]
        return name, value, step

    def recent_mean(self, name: str) -> float | None:
        """Return the mean of a figure over the recent steps."""
        values = [figures_of(row).get(name) for row in self.recent]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    def tokens_per_second(self) -> float | None:
        """Return the tokens per second of all steps together, which have equally many tokens."""
        return self._timed / self._token_seconds if self._token_seconds else None

    def seconds_per_step(self) -> float | None:
        """Return the seconds of a recent step; None after fewer than two."""
        if len(self.recent) < 2:
            return None
        first, last = self.recent[0], self.recent[-1]
        steps = last["step"] - first["step"]
        return (last.get("seconds", 0) - first.get("seconds", 0)) / steps if steps > 0 else None


def was_skipped(row: Mapping[str, Any]) -> bool:
    """Return whether a step changed nothing; runs of the first release record only values that are not finite."""
    return bool(row.get("skipped")) or not all(
        isinstance(row.get(name, 0.0), (int, float)) and math.isfinite(row.get(name, 0.0))
        for name in ("loss", "grad_norm")
    )
