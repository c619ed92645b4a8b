"""Stages of a long measurement: each a process of its own with a time limit, all within one budget.

What bench/gpu.py (`make gpu`) and bench/cpu.py (`make bench`) share. A stage that fails or is too slow costs its own
figures only. After each one rows and outcomes are on disk: rows.jsonl (appended), NAME.json, log.txt. It imports
nothing of fastgpt: `make gpu` starts before there is one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path


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
    """What goes with the stages into NAME.json: seconds for all, commit (given to rows that do not know theirs)."""

    name: str
    budget: float
    commit: str | None


def judge_nothing(stage: Stage) -> None:
    """The exit code says how a stage went."""


def run_stages(
    stages: list[Stage], out: Path, fresh: Path, record: Record, judge: Callable[[Stage], None] = judge_nothing
) -> int:
    """All stages within the budget, results as they come, the table last; 1 if one failed.

    fresh: the file where stages put their rows, emptied into out/rows.jsonl; judge: a second look at each outcome.
    """
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    log.unlink(missing_ok=True)
    end = time.monotonic() + record.budget
    for stage in stages:
        run_stage(stage, min(stage.limit, end - time.monotonic()), log)
        judge(stage)
        collect(fresh, out / "rows.jsonl", record.commit)
        written = {"commit": record.commit, "budget": record.budget, "stages": [asdict(s) for s in stages]}
        (out / f"{record.name}.json").write_text(json.dumps(written, indent=1), encoding="utf-8")
    print(show(stages))
    return 1 if any(s.outcome.startswith("FAILED") for s in stages) else 0


def run_stage(stage: Stage, limit: float, log: Path) -> None:
    """Run one stage; its output goes to the log and its last line into the table."""
    if limit < 5:
        stage.outcome = "not run: out of time"
        return
    if shutil.which(stage.command[0]) is None:
        stage.outcome = f"not run: {stage.command[0]} was not found"
        return
    environment = {**os.environ, **stage.environment, "PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_INTERPRET", None)
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            stage.command,
            cwd=stage.folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            stage.outcome = "passed" if code == 0 else f"FAILED: exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it started
            process.wait()
            stage.outcome = f"FAILED: over its limit of {limit:.0f} s"
        stage.seconds = time.monotonic() - start
        output.seek(0)
        text = output.read()
    stage.last = (text.strip().splitlines() or [""])[-1]
    with log.open("a", encoding="utf-8") as f:
        f.write(f"=== {stage.name}: {stage.outcome}, {stage.seconds:.1f} s: {' '.join(stage.command)}\n{text}\n")
    print(f"=== {stage.name}: {stage.outcome}, {stage.seconds:.1f} s\n{text}", flush=True)


def collect(found: Path, rows: Path, commit: str | None) -> None:
    """Move a stage's rows to the results, with the checkout's commit: the built copy does not know it."""
    if not found.exists():
        return
    with rows.open("a", encoding="utf-8") as f:
        for line in found.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            row["machine"]["commit"] = row["machine"]["commit"] or commit
            f.write(json.dumps(row) + "\n")
    found.unlink()


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
