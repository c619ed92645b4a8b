"""Runs to do, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fastgpt.core.errors import UserError
from fastgpt.sweep import outcome
from fastgpt.sweep.outcome import Outcome
from fastgpt.sweep.spec import Spec


@dataclass(frozen=True)
class Job:
    """A run to do.

    Attributes:
        name: of its trial or variant.
        folder: of the run; the run resumes if it holds a checkpoint.
        arguments: of fastgpt train, without folder, seed and device.
    """

    name: str
    folder: Path
    arguments: list[str]
    seed: int

    def command(self, device: str | None) -> list[str]:
        """Return the arguments of fastgpt train."""
        own = [f"--seed={self.seed}", f"--out={self.folder}"]
        return [*self.arguments, *own, *([f"--device={device}"] if device else [])]


@dataclass(frozen=True)
class Row:
    """A trial or variant with the outcomes of its runs so far.

    Attributes:
        given: its settings over those of all runs, as text.
    """

    name: str
    given: dict[str, str]
    outcomes: list[Outcome]


class Source(Protocol):
    """A kind of sweep: which runs to do next."""

    def next(self) -> Job | None:
        """Return a run to start now; None if there is none, or until another one ends."""

    def report(self, job: Job, value: float, step: int) -> bool:
        """Take the metric of a validation; return whether the run should end."""

    def ended(self, job: Job) -> None:
        """Take note of a run whose result.json has been written."""

    def rows(self) -> list[Row]:
        """Return every trial or variant that has begun."""

    def total(self) -> int:
        """Return the number of runs, if none is pruned or fails."""

    def importances(self) -> dict[str, float]:
        """Return the share of each setting in the differences of the metric; {} where it is not known."""


class Grid:
    """Every variant with every seed; the first seed of all variants comes first."""

    def __init__(self, spec: Spec, out: Path) -> None:
        self.named = spec.named()
        self.jobs = [
            Job(name, out / name / f"seed-{seed}", spec.arguments(given), seed)
            for seed in spec.seeds
            for name, given in self.named.items()
        ]
        self.todo = [job for job in self.jobs if self._result(job) is None]

    @staticmethod
    def _result(job: Job) -> Outcome | None:
        """Return the outcome of a run. Raises UserError if it ran with other settings."""
        found = outcome.read(job.folder)
        if found is not None and found.arguments != job.arguments:
            differ = sorted(set(found.arguments) ^ set(job.arguments))
            raise UserError(
                f"{job.folder} holds a run with other settings ({', '.join(differ)}), expected another --out, or "
                "delete that folder"
            )
        return found

    def next(self) -> Job | None:
        return self.todo.pop(0) if self.todo else None

    def report(self, job: Job, value: float, step: int) -> bool:
        return False

    def ended(self, job: Job) -> None:
        pass

    def rows(self) -> list[Row]:
        found: dict[str, list[Outcome]] = {name: [] for name in self.named}
        for job in self.jobs:
            if (one := self._result(job)) is not None:
                found[job.name].append(one)
        return [Row(name, self.named[name], outcomes) for name, outcomes in found.items()]

    def total(self) -> int:
        return len(self.jobs)

    def importances(self) -> dict[str, float]:
        return {}
