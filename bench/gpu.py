"""Everything that needs a GPU, in one command of under ten minutes: `make gpu`, that is `python3 -m bench.gpu`.

Run in the root of a checkout on the system's own Python: torch, triton, numpy and setuptools are enough; no network, no
virtual environment, nothing installed. It builds with `setup.py build` into a folder of its own, from where the stages
import fastgpt, fastgpt.kernels and fastgpt.bench; then the stages of `plan` run, each in a process of its own with a
time limit. Results go to --out (default: $OUT, else bench/results): rows.jsonl (figures, appended), gpu.json (stages),
parity.json, log.txt. Exit code: 0, 1 if a stage failed, 2 if there is nothing to run on. --dry-run prints the plan.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from . import OPS  # relative: this file runs as bench.gpu, before fastgpt is built, and as fastgpt.bench.gpu

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 590.0  # seconds for all stages
CHECKED_DTYPES = ("float32", "bfloat16")
SANITIZER = "compute-sanitizer"


@dataclass
class Stage:
    """One process: its command, its limit and a guess of its time in seconds, and how it went."""

    name: str
    command: list[str]
    limit: float
    guess: float
    outcome: str = "not run"
    seconds: float = 0.0
    last: str = ""


def rows_of(site: Path) -> Path:
    """Where a stage leaves its rows."""
    return site.parent / "rows.jsonl"


def plan(site: Path, out: Path, python: str = sys.executable) -> list[Stage]:
    """The stages in order of their worth: what comes last is cut when time runs out."""
    rows = ["--json", str(rows_of(site))]
    work = str(site.parent / "objects")
    module = [python, "-m"]
    throughput = [*module, "fastgpt.bench.throughput", "--device", "cuda", *rows]
    quick = ["--dtype", "bf16", "--seconds", "0.3", "--compile"]
    small = [*module, "fastgpt.bench.gpu", "--small-cases"]
    build = [python, "setup.py", "build", "--build-base", work, "--build-lib", str(site), "--build-temp", work]
    return [
        Stage("build", build, 180, 60),
        Stage("doctor", [*module, "fastgpt.cli", "doctor"], 40, 8),
        Stage("parity", [*module, "fastgpt.parity", "--json", str(out / "parity.json")], 180, 80),
        Stage("throughput", [*throughput, "--batch", "64", "--compile", "--ablation"], 200, 120),
        *(Stage(op, [*module, f"fastgpt.bench.{op}", "--device", "cuda", *quick, *rows], 45, 14) for op in OPS),
        Stage("memcheck", [SANITIZER, "--tool", "memcheck", "--error-exitcode", "3", *small], 90, 60),
        Stage("racecheck", [SANITIZER, "--tool", "racecheck", "--error-exitcode", "3", *small], 90, 60),
        Stage("sweep", [*throughput, *(f"--batch={b}" for b in (1, 4, 16))], 90, 40),
    ]


def run_stage(stage: Stage, site: Path, limit: float, log: Path) -> None:
    """Run one stage; its output goes to the log and its last line into the table."""
    if limit < 5:
        stage.outcome = "not run: out of time"
        return
    if shutil.which(stage.command[0]) is None:
        stage.outcome = f"not run: {stage.command[0]} was not found"
        return
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if stage.command[0] == SANITIZER:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each tensor an allocation: its ends are seen
    folder = ROOT if stage.name == "build" else site  # elsewhere ./fastgpt would hide the built one
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            stage.command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
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


def judge_build(stage: Stage) -> None:
    """A build without the CUDA kernels ends well, as an install must; here it is a failure."""
    if stage.outcome == "passed" and "left out cuda" in stage.last:
        stage.outcome = "FAILED: the CUDA kernels were left out"


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


def checkout_commit() -> str | None:
    """The checkout's commit; None without git or its folder."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
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


def show_plan(stages: list[Stage]) -> str:
    """The plan as a table; times are guesses, no figure was measured."""
    lines = [f"{'stage':<21}{'guess':>6}{'limit':>7}  command (seconds; guesses, not measured)"]
    lines += [f"{s.name:<21}{s.guess:>6.0f}{s.limit:>7.0f}  {' '.join(s.command)}" for s in stages]
    total = sum(s.guess for s in stages)
    return "\n".join([*lines, f"{'together':<21}{total:>6.0f}{BUDGET:>7.0f}  a stage gets what is left at most"])


def small_cases() -> int:
    """Parity's base cases in every layout on the GPU, for compute-sanitizer; 1 if one is over the bound."""
    from fastgpt import parity

    over = 0
    for op in parity.SUBJECTS:
        every = [c for c in parity.cases(op) if str(c.dtype).split(".")[1] in CHECKED_DTYPES]
        cases = [c for c in every if c.shape == every[0].shape and "contiguous" in (c.layout, c.grad_layout)]
        for name in parity.backends_here(op):
            over += sum(not r.ratio <= 1 for c in cases for r in parity.check(c, name, "cuda"))
    print(f"small cases: {over} figures over the bound")
    return 1 if over else 0


def no_gpu() -> str | None:
    """Why there is nothing to run on, in one sentence; None if there is a GPU and the checkout."""
    if not (ROOT / "setup.py").is_file():
        return f"{ROOT} is no checkout of fastgpt: run `python3 -m bench.gpu` in the root of one"
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch, which the build and every stage need"
    if not torch.cuda.is_available():
        return "there is no CUDA device here (--dry-run prints the plan)"
    return None


def main(argv: list[str] | None = None) -> int:
    """Run the plan or print it."""
    parser = argparse.ArgumentParser(prog="python3 -m bench.gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="print the plan with guessed times, run nothing")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "bench" / "results"))
    parser.add_argument("--commit", default=checkout_commit(), help="where the sources came without git's folder")
    parser.add_argument("--only", action="append", metavar="STAGE", help="may be repeated; the build always runs")
    parser.add_argument("--small-cases", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.small_cases:
        return small_cases()
    with tempfile.TemporaryDirectory(prefix="fastgpt-gpu-") as work:
        site, out = Path(work) / "site", args.out.resolve()
        stages = [s for s in plan(site, out) if not args.only or s.name in ("build", *args.only)]
        if args.dry_run:
            print(show_plan(stages))
            return 0
        if why := no_gpu():
            print(f"fastgpt: error: {why}", file=sys.stderr)
            return 2
        return run(stages, site, out, args.commit)


def run(stages: list[Stage], site: Path, out: Path, commit: str | None) -> int:
    """All stages within BUDGET, results as they come, the table last; 1 if one failed."""
    out.mkdir(parents=True, exist_ok=True)
    site.mkdir()
    log = out / "log.txt"
    log.unlink(missing_ok=True)
    end = time.monotonic() + BUDGET
    for stage in stages:
        run_stage(stage, site, min(stage.limit, end - time.monotonic()), log)
        if stage.name == "build":
            judge_build(stage)
        collect(rows_of(site), out / "rows.jsonl", commit)
        written = {"commit": commit, "budget": BUDGET, "stages": [asdict(s) for s in stages]}
        (out / "gpu.json").write_text(json.dumps(written, indent=1), encoding="utf-8")
    print(show(stages))
    return 1 if any(s.outcome.startswith("FAILED") for s in stages) else 0


if __name__ == "__main__":
    sys.exit(main())
