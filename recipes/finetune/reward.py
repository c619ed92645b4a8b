"""The reward of grpo.yaml."""

from __future__ import annotations

from typing import Any


def right(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """Return 1 for each completion that is the answer, else 0."""
    return [float(text.strip() == expected) for text, expected in zip(completions, answer)]
