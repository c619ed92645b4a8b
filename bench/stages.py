"""Stages of a long measurement: each a process of its own with a time limit, all within one budget.

What bench/gpu.py (`make gpu`) and bench/cpu.py (`make bench`) share. A stage that fails or is too slow costs its own
figures only, and no end of this process costs what was measured before: rows come as they are made (FRESH), output goes
straight into log.txt, and around each stage rows.jsonl (appended), NAME.json and NAME.txt, the table, are written. It
imports nothing of fastgpt: `make gpu` starts before there is one.
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
SHOWN = 40  # lines of a stage's output that are printed; log.txt has all
LEAST = 5.0  # seconds: a stage with less is not begun
STARTED = "did not end"  # the outcome of a stage under way
Row = dict[str, Any]


@dataclass
class Stage:
    """One process: its command, its limit and a guess of its time in seconds, where it runs, and how it went."""

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
    """What goes with the stages into NAME.json: seconds for all, commit (given to rows that do not know theirs); when
    the seconds began to run (time.monotonic())."""

    name: str
    budget: float
    commit: str | None
    start: float = field(default_factory=time.monotonic)


def judge_nothing(stage: Stage) -> None:
    """The exit code says how a stage went."""


def no_figures(rows: list[Row]) -> list[str]:
    """Stages alone are in the table."""
    return []


def run_stages(
    stages: list[Stage],
    out: Path,
    record: Record,
    judge: Callable[[Stage], None] = judge_nothing,
    figures: Callable[[list[Row]], list[str]] = no_figures,
) -> int:
    """All stages within the budget, results as they come, the table last; 1 if one failed, 130 after Ctrl-C or SIGTERM.

    judge: a second look at each outcome; figures: lines of the table from the rows of this run.
    """
    out.mkdir(parents=True, exist_ok=True)
    log, rows = out / "log.txt", list[Row]()
    log.unlink(missing_ok=True)
    collect(out, record.commit, "")  # what a run left that was killed
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
    """Write NAME.json and the table, each whole at any moment."""
    written = {"commit": record.commit, "budget": record.budget, "stages": [asdict(s) for s in stages]}
    try:
        lines = figures(rows)
    except Exception as e:  # a row that is unlike others must not cost the table
        lines = [f"no figures: {type(e).__name__}: {e}"]
    table = "\n".join([*lines, *([""] if lines else []), show(stages)])
    for name, text in ((f"{record.name}.json", json.dumps(written, indent=1)), (f"{record.name}.txt", table + "\n")):
        aside = out / f".{name}"
        aside.write_text(text, encoding="utf-8")
        aside.replace(out / name)


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Inside, SIGTERM is as Ctrl-C."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_stage(stage: Stage, limit: float, log: Path) -> bool:
    """Run one stage; its output goes to the log and its last line into the table. Whether a signal ended it."""
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
    """The outcome of a stage's process; none of its processes is left after it."""
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
            os.killpg(process.pid, signal.SIGKILL)  # with what it started
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)  # a driver may hold a process for longer; the next stage does not wait for that


_libc: Any = ctypes.CDLL(None) if os.name == "posix" else None


def _follow_parent() -> None:
    """In a stage's process: a group of its own, to be killed as one; on Linux it dies with this process (prctl 1)."""
    os.setpgid(0, 0)
    if hasattr(_libc, "prctl"):
        _libc.prctl(1, signal.SIGKILL)


def collect(out: Path, commit: str | None, stage: str) -> list[Row]:
    """Move a stage's rows to the results, with its name and the checkout's commit, which the built copy does not know.

    A line that the stage could not finish, killed as it was, is left out.
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
    """The commit of a checkout; None without git or its folder."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def show(stages: list[Stage]) -> str:
    """The short table."""
    lines = [f"{'stage':<21}{'seconds':>8}  outcome"]
    for s in stages:
        lines.append(f"{s.name:<21}{s.seconds:>8.1f}  {s.outcome}" + (f" | {s.last[:90]}" if s.last else ""))
    return "\n".join(lines)


def show_plan(stages: list[Stage], budget: float) -> str:
    """The plan as a table; times are guesses, no figure was measured."""
    lines = [f"{'stage':<21}{'guess':>6}{'limit':>7}  command (seconds; guesses, not measured)"]
    lines += [f"{s.name:<21}{s.guess:>6.0f}{s.limit:>7.0f}  {' '.join(s.command)}" for s in stages]
    total = sum(s.guess for s in stages)
    return "\n".join([*lines, f"{'together':<21}{total:>6.0f}{budget:>7.0f}  a stage gets what is left at most"])
