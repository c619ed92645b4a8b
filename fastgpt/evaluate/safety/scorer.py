"""A user's function that rates generations, FILE.py:FUNCTION, called as the reward functions of fine-tuning are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.core.functions import open_function

Scorer = Callable[[Sequence[str], Sequence[str]], list[float]]


def open_scorer(spec: str, setting: str) -> Scorer:
    """Return a function of prompts and completions that calls the user's and checks what it returns.

    Raises:
        UserError: there is no such function; when called, another number of values than completions, or a value that
            is not finite.
    """
    function = open_function(spec, setting)

    def score(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        values: list[Any] = list(function(prompts=list(prompts), completions=list(completions)))
        if len(values) != len(completions):
            raise UserError(f"{setting}: {spec} returned {len(values)} values for {len(completions)} completions")
        wrong = [v for v in values if isinstance(v, str) or v is None or not math.isfinite(v)]
        if wrong:
            raise UserError(f"{setting}: {spec} returned {wrong[0]!r}, expected finite numbers")
        return [float(v) for v in values]

    return score
