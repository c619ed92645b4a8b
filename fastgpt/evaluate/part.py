"""What an evaluation consists of."""

from __future__ import annotations

from typing import Protocol

from fastgpt.evaluate.engine import Engine
from fastgpt.evaluate.results import Results
from fastgpt.evaluate.target import Target


class Part(Protocol):
    """A part of an evaluation."""

    name: str

    def check(self, target: Target) -> None:
        """Check files and settings before anything is computed. Raises UserError."""

    def run(self, engine: Engine, results: Results, limit: int | None) -> None:
        """Evaluate the first `limit` items (None: all) and append what was found to `results`."""


class Note:
    """A part that computes nothing and appends a note, such as which files are missing."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text

    def check(self, target: Target) -> None:
        """Accept any model."""

    def run(self, engine: Engine, results: Results, limit: int | None) -> None:
        """Append the note."""
        results.notes.append(self.text)
