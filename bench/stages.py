"""Stages of a long measurement: each one a process with a time limit, all within one budget.

Shared by bench/gpu.py (`make gpu`) and bench/cpu.py (`make bench`). A stage that fails or is too slow loses only its
own figures, and however this process ends, earlier measurements are kept: rows are appended as soon as they are
measured (FRESH), output goes straight into log.txt, and before and after each stage rows.jsonl (appended), NAME.json
and NAME.txt, the table, are written. This module imports nothing from fastgpt, because `make gpu` starts before it is
built.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FRESH = "fresh.jsonl"  # in the folder of results: where a stage appends its rows
SHOWN = 40  # lines of a stage's output that are printed; log.txt has all of them
LEAST = 5.0  # seconds: a stage with less time left is not started
STARTED = "did not end"  # the outcome of a running stage
Row = dict[str, Any]


@dataclass
class Stage:
    """One process: its command, its limit and expected time in seconds, its folder, and its outcome."""

    name: str
    command: list[str]
    limit: float
    guess: float
    folder: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    outcome: str = "not run"
    seconds: float = 0.0
    last: str = ""


@dataclass(frozen=True)
class Record:
    """What NAME.json holds besides the stages: the budget in seconds for all of them, and the commit (given to rows
    that do not know theirs). `start` is when the budget began (time.monotonic())."""

    name: str
    budget: float
    commit: str | None
    start: float = field(default_factory=time.monotonic)


def judge_nothing(stage: Stage) -> None:
    """Leave the outcome that the exit code gave."""


def no_figures(rows: list[Row]) -> list[str]:
    """Return no lines: the table has only the stages."""
    return []


def run_stages(
    stages: list[Stage],
    out: Path,
    record: Record,
    judge: Callable[[Stage], None] = judge_nothing,
    figures: Callable[[list[Row]], list[str]] = no_figures,
) -> int:
    """Run all stages within the budget, save results as they are measured, and print the table last.

    judge: may change each outcome; figures: lines of the table from the rows of this run. Returns 0, 1 if a stage
        failed, 130 after Ctrl-C or SIGTERM.
    """
    out.mkdir(parents=True, exist_ok=True)
    log, rows = out / "log.txt", list[Row]()
    log.unlink(missing_ok=True)
    collect(out, record.commit, "")  # rows left by a run that was killed
    interrupted = False
    for stage in stages:
        if not interrupted:
            stage.outcome = STARTED
            keep(stages, rows, out, record, figures)
            interrupted = run_stage(stage, min(stage.limit, record.start + record.budget - time.monotonic()), log)
        judge(stage)
        rows += collect(out, record.commit, stage.name)
        keep(stages, rows, out, record, figures)
    print((out / f"{record.name}.txt").read_text(encoding="utf-8"), end="", flush=True)
    return 130 if interrupted else int(any(s.outcome.startswith("FAILED") for s in stages))


def keep(
    stages: list[Stage], rows: list[Row], out: Path, record: Record, figures: Callable[[list[Row]], list[str]]
) -> None:
    """Write NAME.json and the table, each replaced atomically."""
    written = {"commit": record.commit, "budget": record.budget, "stages": [asdict(s) for s in stages]}
    try:
        lines = figures(rows)
    except Exception as e:  # an unexpected row must not prevent the table
        lines = [f"no figures: {type(e).__name__}: {e}"]
    table = "\n".join([*lines, *([""] if lines else []), show(stages)])
    for name, text in ((f"{record.name}.json", json.dumps(written, indent=1)), (f"{record.name}.txt", table + "\n")):
        aside = out / f".{name}"
        aside.write_text(text, encoding="utf-8")
        aside.replace(out / name)


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C within the context."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_stage(stage: Stage, limit: float, log: Path) -> bool:
    """Run one stage, writing its output to the log and its last line to the table; return whether a signal ended it."""
    if limit < LEAST:
        stage.outcome = "not run: out of time"
        return False
    if shutil.which(stage.command[0]) is None:
        stage.outcome = f"not run: {stage.command[0]} was not found"
        return False
    environment = {**os.environ, **stage.environment, "PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_INTERPRET", None)
    start, interrupted = time.monotonic(), False
    with log.open("a+b") as output:
        output.write(f"=== {stage.name}: {' '.join(stage.command)}\n".encode())
        output.flush()
        began = output.seek(0, os.SEEK_END)
        try:
            with sigterm_interrupts():
                stage.outcome = _watch(stage, environment, output, limit)
        except KeyboardInterrupt:
            stage.outcome, interrupted = "FAILED: interrupted", True
        stage.seconds = time.monotonic() - start
        output.seek(began)
        text = output.read().decode(errors="replace")
    lines = text.strip().splitlines() or [""]
    stage.last = lines[-1]
    print(f"=== {stage.name}: {stage.outcome}, {stage.seconds:.1f} s", *lines[-SHOWN:], sep="\n", flush=True)
    return interrupted


def _watch(stage: Stage, environment: dict[str, str], output: Any, limit: float) -> str:
    """Return the outcome of a stage's process; kill every process that it leaves behind."""
    process = subprocess.Popen(
        stage.command,
        cwd=stage.folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        preexec_fn=_follow_parent,
    )
    try:
        code = process.wait(limit)
        return "passed" if code == 0 else f"FAILED: exit code {code}"
    except subprocess.TimeoutExpired:
        return f"FAILED: over its limit of {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # and the processes that it started
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)  # a driver may hold a process for longer; the next stage does not wait for it


_libc: Any = ctypes.CDLL(None) if os.name == "posix" else None


def _follow_parent() -> None:
    """Start a process group in a stage's process, to be killed as one; on Linux it dies with this process (prctl 1)."""
    os.setpgid(0, 0)
    if hasattr(_libc, "prctl"):
        _libc.prctl(1, signal.SIGKILL)


def collect(out: Path, commit: str | None, stage: str) -> list[Row]:
    """Move a stage's rows to the results, adding its name and the checkout's commit, which the built copy does not
    know.

    A line that a killed stage could not finish is left out.
    """
    fresh, rows = out / FRESH, []
    if not fresh.exists():
        return []
    for line in fresh.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            row["machine"]["commit"] = row["machine"]["commit"] or commit
            rows.append({**row, "stage": stage} if stage else row)
    with (out / "rows.jsonl").open("a", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    fresh.unlink()
    return rows


def checkout_commit(root: Path) -> str | None:
    """Return the commit of a checkout; None without git or its folder."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def show(stages: list[Stage]) -> str:
    """Return the short table."""
    lines = [f"{'stage':<21}{'seconds':>8}  outcome"]
    for s in stages:
        lines.append(f"{s.name:<21}{s.seconds:>8.1f}  {s.outcome}" + (f" | {s.last[:90]}" if s.last else ""))
    return "\n".join(lines)


def show_plan(stages: list[Stage], budget: float) -> str:
    """Return the plan as a table; its times are guesses, not measurements."""
    lines = [f"{'stage':<21}{'guess':>6}{'limit':>7}  command (seconds; guesses, not measured)"]
    lines += [f"{s.name:<21}{s.guess:>6.0f}{s.limit:>7.0f}  {' '.join(s.command)}" for s in stages]
    total = sum(s.guess for s in stages)
    return "\n".join([*lines, f"{'total':<21}{total:>6.0f}{budget:>7.0f}  a stage gets at most the time that is left"])
