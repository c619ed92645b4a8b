"""Everything that needs a GPU, in one command of under ten minutes: `make gpu`, that is `python3 -m bench.gpu`.

Run in the root of a checkout on the system's own Python: torch, triton, numpy and setuptools are enough; no network, no
virtual environment, nothing installed. It builds with `setup.py build` into a folder of its own, from where the stages
import fastgpt, fastgpt.kernels and fastgpt.bench; then the stages of `plan` run, each in a process of its own with a
time limit. Results go to --out (default: $OUT, else bench/results): rows.jsonl (figures, appended), gpu.json (stages),
parity.json, log.txt. Exit code: 0, 1 if a stage failed, 2 if there is nothing to run on. --dry-run prints the plan.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from . import OPS  # relative: this file runs as bench.gpu, before fastgpt is built, and as fastgpt.bench.gpu
from .stages import Record, Stage, checkout_commit, run_stages, show_plan

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 590.0  # seconds for all stages
CHECKED_DTYPES = ("float32", "bfloat16")
SANITIZER = "compute-sanitizer"


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
    stages = [
        Stage("build", build, 180, 60),
        Stage("doctor", [*module, "fastgpt.cli", "doctor"], 40, 8),
        Stage("parity", [*module, "fastgpt.parity", "--json", str(out / "parity.json")], 180, 80),
        Stage("throughput", [*throughput, "--batch", "64", "--compile", "--ablation"], 200, 120),
        *(Stage(op, [*module, f"fastgpt.bench.{op}", "--device", "cuda", *quick, *rows], 45, 14) for op in OPS),
        Stage("roofline", [*module, "fastgpt.bench.roofline", "--device", "cuda", *rows], 60, 15),
        Stage("memcheck", [SANITIZER, "--tool", "memcheck", "--error-exitcode", "3", *small], 90, 60),
        Stage("racecheck", [SANITIZER, "--tool", "racecheck", "--error-exitcode", "3", *small], 90, 60),
        Stage("sweep", [*throughput, *(f"--batch={b}" for b in (1, 4, 16))], 90, 40),
    ]
    for stage in stages:
        stage.folder = str(ROOT if stage.name == "build" else site)  # elsewhere ./fastgpt would hide the built one
        stage.environment = {"PYTHONPATH": str(site)}
        if stage.command[0] == SANITIZER:
            stage.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each tensor an allocation: its ends are seen
    return stages


def judge_build(stage: Stage) -> None:
    """A build without the CUDA kernels ends well, as an install must; here it is a failure."""
    if stage.outcome == "passed" and "left out cuda" in stage.last:
        stage.outcome = "FAILED: the CUDA kernels were left out"


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
    parser.add_argument("--commit", default=checkout_commit(ROOT), help="where the sources came without git's folder")
    parser.add_argument("--only", action="append", metavar="STAGE", help="may be repeated; the build always runs")
    parser.add_argument("--small-cases", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.small_cases:
        return small_cases()
    with tempfile.TemporaryDirectory(prefix="fastgpt-gpu-") as work:
        site, out = Path(work) / "site", args.out.resolve()
        stages = [s for s in plan(site, out) if not args.only or s.name in ("build", *args.only)]
        if args.dry_run:
            print(show_plan(stages, BUDGET))
            return 0
        if why := no_gpu():
            print(f"fastgpt: error: {why}", file=sys.stderr)
            return 2
        return run(stages, site, out, args.commit)


def run(stages: list[Stage], site: Path, out: Path, commit: str | None) -> int:
    """All stages within BUDGET; 1 if one failed."""
    site.mkdir()
    return run_stages(stages, out, rows_of(site), Record("gpu", BUDGET, commit), judge_build)


if __name__ == "__main__":
    sys.exit(main())
