"""The figure of a validation that decides which checkpoint is the best: its goal, its value, and whether it exists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from fastgpt.core.errors import UserError
from fastgpt.core.options import did_you_mean

Goal = Literal["auto", "min", "max"]
# words and names that tell
MIN = {"loss", "perplexity", "ppl", "bpb", "bits", "error", "errors", "mse", "rmse", "mae", "nll", "wer", "cer"}
MIN |= {"cross_entropy", "divergence"}
MAX = {"accuracy", "acc", "f1", "precision", "recall", "match", "em", "matthews", "pearson", "spearman", "auc"}
MAX |= {"reward", "margin", "bleu", "chrf", "rouge", "rouge1", "rouge2", "rougel", "rougelsum", "pass"}


def goal_of(name: str, goal: Goal = "auto") -> Literal["min", "max"] | None:
    """Return whether a figure should be low or high; None where its name does not tell.

    The last part of a dotted name that has a word of MIN or MAX decides: that of harness.lambada.acc_norm is acc_norm.
    """
    if goal != "auto":
        return goal
    for part in reversed(name.lower().split(".")):
        words = {part.removeprefix("val_"), *re.split(r"[^a-z0-9]+", part)}
        low, high = bool(words & MIN), bool(words & MAX)
        if "stderr" in words or (low and high):
            return None
        if low or high:
            return "min" if low else "max"
    return None


def full_name(metric: str, names: Iterable[str]) -> str | None:
    """Return which of the names of a validation `metric` means, with "val_" or without; None if there is none."""
    known = set(names)
    return next((name for name in (metric, f"val_{metric}") if name in known), None)


def value_of(figures: Mapping[str, float], metric: str, presets: Iterable[str] = ()) -> float | None:
    """Return the figure of a validation that `metric` names; None if it is one of a preset (`presets`: their names)
    that was not due.

    Raises:
        UserError: there is none of this name.
    """
    name = full_name(metric, figures)
    if name is not None:
        return figures[name]
    for preset in presets:
        if metric.startswith(f"{preset}.") and not any(other.startswith(f"{preset}.") for other in figures):
            return None
    raise UserError(_unknown(metric, figures))


def check(run: Any, evaluations: Iterable[str]) -> None:
    """Check before the first step that validations have cfg.metric, by validating on one batch where it is not
    val_loss.

    Args:
        evaluations: names of evaluations, whose figures are known only once they ran.

    Raises:
        UserError: they do not.
    """
    metric, known = run.cfg.metric, list(evaluations)
    if full_name(metric, ["val_loss"]) or metric.partition(".")[0] in known:
        return
    figures = run.task.validate(run, 1)
    if full_name(metric, figures) is None:
        raise UserError(_unknown(metric, [*figures, *(f"{name}.FIGURE" for name in known)]))


def _unknown(metric: str, names: Iterable[str]) -> str:
    """Return the sentence on a metric that no validation has."""
    found = sorted(names)
    near = did_you_mean(metric, found)
    return f"metric is {metric!r}{near}, expected a figure of the validation: {', '.join(found)}"
