"""Everything that needs a GPU, in one command of under ten minutes: `make gpu`, which runs `python3 -m bench.gpu`.

Run it in the root of a checkout with the system's Python: torch, triton, numpy, pytest and setuptools are enough; no
network, no virtual environment, nothing to install. It builds for this GPU alone with `setup.py build` into a separate
folder, from which the stages import fastgpt. Then the stages of `plan` run, the most valuable first, each in its own
process with a time limit. The limits (not only the guesses) of the first FIRST stages fit the budget.

Results go to --out (default: $OUT, else gpu-results): rows.jsonl (figures, appended; fresh.jsonl while a stage runs),
parity.jsonl, gpu.json (stages), log.txt, and the table, gpu.txt, which is printed last. Whatever ends a stage or this
command, earlier measurements are kept. Exit code: 0, 1 if a stage failed, 2 if there is nothing to run on, 130 after
Ctrl-C. --dry-run prints the plan, --table the table of a run that was killed; --check (`make gpu-check`) runs
compute-sanitizer over the CUDA kernels instead.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import OPS  # relative: runs as bench.gpu before fastgpt is built, and as fastgpt.bench.gpu
from .gpu_table import figures
from .stages import FRESH, Record, Stage, checkout_commit, run_stages, show_plan

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 540.0  # seconds from this command's start to its last line
CHECK_BUDGET = 570.0
FIRST = 6  # number of stages that are certain to get their time
CHECKED_DTYPES = ("float32", "bfloat16")
SANITIZER = "compute-sanitizer"
PROBE = """
import torch
found = torch.cuda.is_available()
print(*(torch.cuda.get_device_capability() if found else ()))
"""


def plan(site: Path, out: Path, arch: str, python: str = sys.executable, device: str = "cuda") -> list[Stage]:
    """Return the stages, the most valuable first: the last ones are cut when time runs out.

    site: the build's folder; arch: TORCH_CUDA_ARCH_LIST of this GPU.
    """
    rows = ["--json", str(out / FRESH)]
    on = ["--device", device]
    module = [python, "-m"]
    steps = [*module, "fastgpt.bench.throughput", *on, *rows]
    core = [*steps, "--variant", "fastgpt", "--variant", "fastgpt graphs"]
    op = {op: [*module, f"fastgpt.bench.{op}", *on, "--dtype", "bf16", "--seconds", "0.3", *rows] for op in OPS}
    jobs = str(max(1, min(12, (os.cpu_count() or 1) - 2)))
    parity = [*module, "fastgpt.parity", "--jobs", jobs, "--json", str(out / "parity.jsonl")]
    tests = [*module, "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    model = [*module, "fastgpt.bench.model.command", "--source", str(ROOT), "--chip", "here", "--shape", "gpt2-124m"]
    model += ["--kernels", "auto", *rows]  # of the sources, since the build has no tests/cuda_on_cpu
    nn = [str(ROOT / "tests" / f"{name}.py") for name in ("test_nn", "test_nn_use", "test_model_parity")]
    stages = [
        build(site, arch, python),
        Stage("throughput", core, 80, 45),
        Stage("attention", op.pop("attention"), 50, 25),
        Stage("tune", [*module, "fastgpt.bench.tune", *on, "--seconds", "0.3", *rows], 50, 30),
        Stage("throughput tuned", core, 60, 40),
        Stage("parity", parity, 125, 90),
        Stage("torch compile", [*steps, "--variant", "fastgpt graphs", "--variant", "torch compile"], 100, 60),
        Stage("training", [*module, "fastgpt.bench.training", *on, *rows], 60, 35),
        Stage("graphs", [*tests, str(ROOT / "tests" / "test_graphs.py"), "-k", "graph_of_the_gpu"], 60, 30),
        Stage("tiles", [*module, "fastgpt.bench.tiles", *on, *rows], 70, 45),
        Stage("doctor", [*module, "fastgpt.cli", "doctor"], 40, 20),
        *(Stage(name, command, 45, 25) for name, command in op.items()),
        Stage("fastgpt compile", [*steps, "--variant", "fastgpt compile"], 90, 60),
        Stage("roofline", [*module, "fastgpt.bench.roofline", *on, *rows], 60, 25),
        Stage("model", model, 90, 60),
        Stage("ablation", [*steps, "--ablation"], 120, 70),
        Stage("modules", [*tests, *nn], 120, 60),
        Stage("batches", [*steps, *(f"--batch={b}" for b in (1, 4, 16))], 120, 70),
    ]
    return within(stages, site)


def plan_check(site: Path, out: Path, arch: str, python: str = sys.executable) -> list[Stage]:
    """Return the build and compute-sanitizer's tools over the CUDA kernels; `plan` leaves them out, as each takes
    minutes."""
    small = [python, "-m", "fastgpt.bench.gpu", "--small-cases"]
    sanitize = [SANITIZER, "--error-exitcode", "3", "--kernel-regex", "kns=fastgpt", "--tool"]
    checks = [Stage(tool, [*sanitize, tool, *small], 190, 120) for tool in ("memcheck", "racecheck")]
    for stage in checks:
        stage.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # one allocation per tensor: overruns are seen
    return within([build(site, arch, python), *checks], site)


def build(site: Path, arch: str, python: str) -> Stage:
    """Return the build; Python files are built first, so Triton kernels exist even if the compilers fail."""
    work = str(site.parent / "objects")
    command = [python, "setup.py", "build", "--build-base", work, "--build-lib", str(site), "--build-temp", work]
    return Stage("build", command, 160, 110, environment={"TORCH_CUDA_ARCH_LIST": arch} if arch else {})


def within(stages: list[Stage], site: Path) -> list[Stage]:
    """Set where the stages run: in the built copy (elsewhere ./fastgpt would hide it), with a separate cache."""
    for stage in stages:
        stage.folder = str(ROOT if stage.name == "build" else site)
        stage.environment |= {"PYTHONPATH": str(site), "XDG_CACHE_HOME": str(site.parent / "cache")}
    return stages


def judge_build(stage: Stage) -> None:
    """Fail a build without CUDA kernels: an install may succeed without them, this command may not."""
    if stage.name == "build" and stage.outcome == "passed" and "left out cuda" in stage.last:
        stage.outcome = "FAILED: the CUDA kernels were left out"


def small_cases() -> int:
    """Check parity's base cases in every layout on the CUDA kernels, for compute-sanitizer; return 1 if one is over the
    bound."""
    from fastgpt import parity

    over = 0
    for op in parity.SUBJECTS:
        every = [c for c in parity.cases(op) if str(c.dtype).split(".")[1] in CHECKED_DTYPES]
        cases = [c for c in every if c.shape == every[0].shape and "contiguous" in (c.layout, c.grad_layout)]
        if "cuda" in parity.backends_here(op):
            over += sum(not r.ratio <= 1 for c in cases for r in parity.check(c, "cuda", "cuda"))
    print(f"small cases: {over} figures over the bound")
    return 1 if over else 0


def probe() -> tuple[str, str]:
    """Return this GPU as TORCH_CUDA_ARCH_LIST names it, and in one sentence why there is nothing to run on; one is
    empty.

    It asks in a separate process, so this one holds no GPU memory.
    """
    if not (ROOT / "setup.py").is_file():
        return "", f"{ROOT} is not a checkout of fastgpt: run `python3 -m bench.gpu` in the root of one"
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "", "the GPU does not respond: torch.cuda.is_available() took more than 120 s"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return "", f"{sys.executable} cannot import torch, which the build and every stage need ({last})"
    if not done.stdout.strip():
        return "", "there is no CUDA device here (--dry-run prints the plan)"
    return arch_of(*map(int, done.stdout.split())), ""


def arch_of(major: int, minor: int) -> str:
    """Return the architecture's name; from 9.0 on with the instructions of that chip alone (wgmma)."""
    return f"{major}.{minor}" + ("a" if major >= 9 else "")


def table_of(out: Path) -> str:
    """Return the table of the last run in `out`, followed by the rows of a stage that was killed with this command."""
    text = (out / "gpu.txt").read_text(encoding="utf-8")
    fresh = out / FRESH
    rows = []
    for line in fresh.read_text(encoding="utf-8").splitlines() if fresh.exists() else []:
        try:
            rows.append({**json.loads(line), "stage": "killed"})
        except ValueError:
            continue  # cut off by the kill
    return "\n".join([text, *figures(rows)])


def main(argv: list[str] | None = None) -> int:
    """Run the plan or print it."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(prog="python3 -m bench.gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="print the plan with its limits, without running it")
    parser.add_argument("--check", action="store_true", help="run compute-sanitizer on the CUDA kernels instead")
    parser.add_argument(
        "--table", action="store_true", help="print the table of the last run in --out, without running anything"
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "gpu-results"))
    parser.add_argument(
        "--commit", default=checkout_commit(ROOT), help="commit of the sources, if they have no .git folder"
    )
    parser.add_argument(
        "--only", action="append", metavar="STAGE", help="stage to run; may be repeated; the build always runs"
    )
    parser.add_argument("--small-cases", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    out = args.out.resolve()
    if args.small_cases:
        return small_cases()
    if args.table:
        print(table_of(out))
        return 0
    arch, why = ("9.0a", "") if args.dry_run else probe()
    if why:
        print(f"fastgpt: error: {why}", file=sys.stderr)
        return 2
    budget = CHECK_BUDGET if args.check else BUDGET
    with tempfile.TemporaryDirectory(prefix="fastgpt-gpu-", ignore_cleanup_errors=True) as work:
        site = Path(work) / "site"
        site.mkdir()
        stages = plan_check(site, out, arch) if args.check else plan(site, out, arch)
        if unknown := set(args.only or ()) - {s.name for s in stages}:
            parser.error(f"there is no stage {min(unknown)!r}, expected {', '.join(s.name for s in stages)}")
        stages = [s for s in stages if not args.only or s.name in ("build", *args.only)]
        if args.dry_run:
            print(show_plan(stages, budget))
            return 0
        name = "gpu-check" if args.check else "gpu"
        return run_stages(stages, out, Record(name, budget, args.commit, start), judge_build, figures)


if __name__ == "__main__":
    sys.exit(main())
