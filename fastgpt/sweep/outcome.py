"""What a run of a sweep came to, read from its folder and kept there in result.json."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import signal
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastgpt.core.errors import UserError
from fastgpt.core.folders import write_text
from fastgpt.report.metrics import RECENT
from fastgpt.report.rows import Tail, read_json
from fastgpt.training.metric import full_name

RESULT, OUTPUT = "result.json", "output.txt"
LAST_FILE = "samples.txt"  # what fastgpt train writes last, unless a signal stops it
ERROR = "fastgpt: error: "
LAST_BYTES = 65536  # of a run's output, where the reason of its end is looked for


@dataclass(frozen=True)
class Figures:
    """What the metrics of a run say.

    Attributes:
        value: the metric's last value; of a figure of steps the mean over the last RECENT. None: there is none.
        step: the last step.
        tokens_per_second: the median over the steps.
        seconds: time of training, without validations and checkpoints.
    """

    value: float | None
    step: int
    tokens_per_second: float | None
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        arguments: the settings of fastgpt train that it ran with, without those of the folder, seed and device.
        value: the metric; None of a run that failed.
        reason: why it failed or was pruned.
    """

    status: Literal["complete", "pruned", "failed"]
    arguments: list[str]
    seed: int
    value: float | None
    step: int
    tokens_per_second: float | None
    seconds: float
    reason: str = ""


def figures(folder: Path, metric: str) -> Figures:
    """Return what a run's metrics.jsonl says up to now."""
    step, seconds, value = 0, 0.0, None
    speeds: list[float] = []
    recent: deque[float] = deque(maxlen=RECENT)
    for row in Tail(folder / "metrics.jsonl").read():
        name = full_name(metric, row)
        if "loss" in row:
            step, seconds = row["step"], row.get("seconds", seconds)
            speeds.append(row.get("tokens_per_second", math.nan))
            recent.extend([] if name is None else [row[name]])
        elif name is not None:
            value = row[name]
    if value is None and recent:
        value = sum(recent) / len(recent)
    return Figures(value, step, statistics.median(speeds) if speeds else None, seconds)


def has_finished(folder: Path) -> bool:
    """Return whether the process of a run, since it was started last, trained to the end and evaluated the result."""
    return (folder / LAST_FILE).exists()


def of_end(folder: Path, metric: str, arguments: list[str], seed: int, code: int) -> Outcome:
    """Return the outcome of a run whose process ended with exit code `code`, negative: by that signal."""
    found = figures(folder, metric)
    value, reason = found.value, ""
    if code:
        reason = reason_of(folder / OUTPUT, code)
    elif not has_finished(folder):
        reason = "stopped by a signal"
    elif value is None:
        reason = f"no row of metrics.jsonl has {metric}"
    elif not math.isfinite(value):
        reason = f"{metric} is {value}"
    kept = None if reason else value
    status: Literal["complete", "failed"] = "failed" if reason else "complete"
    return Outcome(status, arguments, seed, kept, found.step, found.tokens_per_second, found.seconds, reason)


def pruned(folder: Path, metric: str, arguments: list[str], seed: int, value: float, step: int) -> Outcome:
    """Return the outcome of a run that was ended after a validation with `value` at `step`."""
    found = figures(folder, metric)
    reason = f"{metric} {value:.4f} at step {step}"
    return Outcome("pruned", arguments, seed, value, found.step, found.tokens_per_second, found.seconds, reason)


def reason_of(output: Path, code: int) -> str:
    """Return in a sentence why a process failed: its error, else the last line of its output."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"ended by {name}" + (", which the system sends when memory runs out" if code == -signal.SIGKILL else "")
    try:
        with output.open("rb") as file:
            file.seek(max(0, output.stat().st_size - LAST_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        text = ""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    errors = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
    return (errors or lines or [f"exit code {code}"])[-1]


def read(folder: Path) -> Outcome | None:
    """Return the outcome of a run; None while it has none.

    Raises:
        UserError: result.json is damaged.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    values: dict[str, Any] = read_json(path)
    try:
        return Outcome(**values)
    except TypeError:
        raise UserError(f"{path} is damaged, expected the result of a run; delete its folder to repeat it") from None


def write(folder: Path, outcome: Outcome) -> None:
    """Write result.json, whole or not at all."""
    write_text(folder / RESULT, json.dumps(dataclasses.asdict(outcome), indent=1))
