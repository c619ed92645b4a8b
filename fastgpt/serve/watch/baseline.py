"""Baselines of drift by model, in a file of numbers: {"version": 1, "window": n, "models": {NAME: {MEASURE: [...]}}}.

The first n answers of a model without a baseline become its baseline, in ascending order: the file tells nothing about
single answers or users.
"""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from fastgpt.core.errors import UserError, cause_of
from fastgpt.core.folders import write_text
from fastgpt.serve.watch.drift import NUMBERS, SHARES, Finding, Values, Window

VERSION, WINDOW = 1, 500


class Baselines:
    """The windows of models beside their baselines.

    Args:
        file: read if it exists; baselines that are complete are written to it.
        n: answers of a window; None: as in the file, or WINDOW.
        alpha: as Window's, for each model.

    Raises:
        UserError: the file is no baseline, or has windows of another size.
    """

    def __init__(self, file: Path, n: int | None, alpha: float) -> None:
        self.file, self.alpha = file, alpha
        if not file.exists():
            _require_writable(file)
        found: dict[str, Any] = _read(file) if file.exists() else {"window": n or WINDOW, "models": {}}
        self.n: int = found["window"]
        if n is not None and n != self.n:
            raise UserError(f"--drift-window is {n}, and {file} has windows of {self.n}; record another --baseline")
        self._recorded: dict[str, dict[str, list[float]]] = found["models"]
        self._windows = {name: Window(self.n, alpha, values) for name, values in self._recorded.items()}

    def window(self, model: str) -> Window:
        """Return the window of a model; one without a baseline begins to record it."""
        return self._windows.setdefault(model, Window(self.n, self.alpha, {}))

    def add(self, model: str, values: Values) -> list[Finding]:
        """Add an answer; return what was found if windows were compared.

        Raises:
            OSError: a baseline is complete and cannot be written.
        """
        window = self.window(model)
        was = window.recorded
        found = window.add(values)
        if window.recorded and not was:
            complete = {name: sorted(v) for name, v in window.baseline.items() if len(v) == self.n}
            window.baseline = self._recorded[model] = complete
            about = {"version": VERSION, "window": self.n, "models": self._recorded}
            write_text(self.file, json.dumps(about) + "\n")
        return found


def _require_writable(file: Path) -> None:
    """Raise UserError if a file cannot be made: its numbers come only after many answers."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as e:
        raise UserError(f"--baseline: {file} cannot be written ({cause_of(e)})") from None


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        ok = found["version"] == VERSION and isinstance(found["window"], int) and found["window"] > 0
        for values in found["models"].values():
            ok = ok and bool(values) and set(values) <= {*SHARES, *NUMBERS}
            ok = ok and all(len(v) == found["window"] and all(map(math.isfinite, v)) for v in values.values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        why = cause_of(e) if isinstance(e, OSError) else "another form"
        raise UserError(f"--baseline: {file} cannot be read ({why}), expected what `fastgpt serve` recorded") from None
    if not ok:
        raise UserError(f"--baseline: {file} is damaged, expected what `fastgpt serve` recorded; delete it")
    return dict(found)
