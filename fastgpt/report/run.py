"""A run as its folder shows it: settings, metrics, samples, checkpoints, and whether it is running."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.report.metrics import Metrics
from fastgpt.report.rows import Tail, read_json
from fastgpt.report.series import MOST
from fastgpt.training.runlog import PROGRESS, SAMPLES

SEPARATOR = "\n\n=====\n\n"  # between the texts of samples.txt


@dataclass
class RunFiles:
    """The files of a run.

    Attributes:
        name: what a reader calls it.
        header: run.json.
    """

    folder: Path
    name: str
    header: dict[str, Any]
    tail: Tail
    metrics: Metrics
    progress: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, name: str = "", most: int = MOST) -> RunFiles:
        """Open a run without reading its metrics.

        Raises:
            UserError: there is no run in `folder`.
        """
        tail, header = Tail(folder / "metrics.jsonl"), read_json(folder / "run.json")
        if not tail.path.is_file():
            there = "there is no such folder" if not folder.is_dir() else "it has no metrics.jsonl"
            raise UserError(f"{folder} is no run ({there}), expected the folder of fastgpt train or finetune")
        return cls(folder, name or folder.resolve().name, header, tail, Metrics(most))

    def refresh(self) -> bool:
        """Read the rows that are new; return whether there are some, or the run has resumed."""
        self.progress = read_json(self.folder / PROGRESS)
        again = self.tail.replaced()
        if again:
            self.metrics, self.header = Metrics(self.metrics.most), read_json(self.folder / "run.json")
        grown = False
        for row in self.tail.read():
            self.metrics.add(row)
            grown = True
        return grown or again

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that run.json records."""
        found = self.header.get("config")
        return found if isinstance(found, dict) else {}

    @property
    def last_step(self) -> int | None:
        """The step that the run ends with, as far as it is known."""
        found = self.progress.get("last_step", self.settings.get("max_steps"))
        return found if isinstance(found, int) else None

    def ended(self) -> str:
        """Return why the run is not running, else ""."""
        p, step = self.progress, self.metrics.last.get("step", 0)
        if p.get("ended"):
            return f"the run ended at step {step:,}"
        if not p:  # a run of the first release
            return f"the run ended at step {step:,}" if self.last_step is not None and step >= self.last_step else ""
        return f"the process of the run is gone since step {step:,}" if p.get("host") == _host() and _gone(p) else ""

    def best(self) -> tuple[str, float, int, Path | None] | None:
        """Return the metric, its best value, the step of that, and the checkpoint if it is there."""
        found = self.metrics.best(self.settings)
        if found is None:
            return None
        path = self.folder / f"step_{found[2]:08d}"
        return *found, path if path.is_dir() else None

    def samples(self) -> list[tuple[str, str]]:
        """Return titles and texts: those while training, then those of the end."""
        during = [(f"step {row['step']:,}", str(row.get("text", ""))) for row in Tail(self.folder / SAMPLES).read()]
        try:
            text = (self.folder / "samples.txt").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return during
        return during + [("at the end", part) for part in text.split(SEPARATOR)]

    def unread(self) -> str:
        """Return a sentence on lines that could not be read, else ""."""
        lines = self.tail.damaged + self.tail.half
        return f"{self.tail.path}: {lines} damaged or half-written {_lines(lines)} skipped" if lines else ""


def _lines(n: int) -> str:
    return "line was" if n == 1 else "lines were"


def _host() -> str:
    return platform.node()


def _gone(progress: dict[str, Any]) -> bool:
    """Return whether the process that trains has ended without saying so, as after SIGKILL."""
    process = progress.get("process")
    if os.name != "posix" or not isinstance(process, int) or process <= 0:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False


def names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell the folders apart.

    Raises:
        UserError: one is given twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        found = ["/".join(part[-length:]) for part in parts]
        if len(set(found)) == len(found):
            return found
    twice = next(str(f) for f, part in zip(folders, parts) if parts.count(part) > 1)
    raise UserError(f"{twice} is given twice, expected different runs")


def rounded(value: float, digits: int = 5) -> float | None:
    """Return a number with `digits` significant digits, whole if it is; None if it is not finite."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short
