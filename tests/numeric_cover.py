"""The numeric tests under settings that change how a library computes, so that no verdict depends on them.

    python tests/numeric_cover.py [--runs 1,5] [--every N] [--log FILE]

Each pair of settings (instruction sets of PyTorch, MKL, oneDNN and OpenBLAS, threads, seeds of the inputs) meets in at
least one run. A run takes every N-th case of parity, other ones for other seeds, and the other numeric tests whole. The
log, in Markdown, is written anew after each run. Exits 1 if a run was red.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
MOST_RUNS = 12
TESTS = (
    "tests/ops/test_parity.py::test_parity",
    "tests/ops/test_attention.py::test_gradients_of_large_scores",
    "tests/test_model_parity.py",
    "tests/test_nn.py",
    "tests/test_optim_torch.py",
    "tests/test_triton_kernels.py",
    "tests/test_triton_adamw.py",
)
Setting = dict[str, str]  # variable -> value; "": not set


def processor() -> tuple[str, set[str]]:
    """Name and features of the processor, as Linux has them."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    name, flags = re.search(r"^model name\s*:\s*(.*)", text, re.M), re.search(r"^flags\s*:\s*(.*)", text, re.M)
    return name[1] if name else platform.processor() or platform.machine(), set(flags[1].split() if flags else ())


def factors(features: set[str]) -> dict[str, list[str]]:
    """The values of each setting that this processor supports; `SEED` is the option --seed of pytest."""
    found = {"OMP_NUM_THREADS": ["1", "2"], "SEED": ["0", "1", "2"]}
    if "sse2" not in features:  # not x86-64: these libraries have one way
        return found
    avx2, avx512 = {"avx2", "fma"} <= features, {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= features
    found["OPENBLAS_CORETYPE"] = ["Prescott"] + ["Haswell", "Zen"] * avx2 + ["SkylakeX"] * avx512
    found["ATEN_CPU_CAPABILITY"] = ["default"] + ["avx2"] * avx2 + ["avx512"] * avx512
    found["MKL_CBWR"] = ["", "COMPATIBLE"]
    found["ONEDNN_MAX_CPU_ISA"] = [""] + ["AVX2"] * avx2
    return found


def pairs(setting: Setting) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    return set(itertools.combinations(sorted(setting.items()), 2))


def cover(values: dict[str, list[str]], attempts: int = 200) -> list[Setting]:
    """Settings in which every pair of values of two factors occurs: greedily, the fewest of some attempts."""
    every = [dict(zip(values, row)) for row in itertools.product(*values.values())]
    found = [(setting, pairs(setting)) for setting in every]
    best: list[Setting] = every
    fewest = max((len(a) * len(b) for a, b in itertools.combinations(values.values(), 2)), default=1)
    for attempt in range(attempts):
        random.Random(attempt).shuffle(found)
        left, chosen = set().union(*(p for _, p in found)), []
        while left and len(chosen) < len(best):
            setting, most = max(found, key=lambda s: len(s[1] & left))
            chosen.append(setting)
            left -= most
        if not left and len(chosen) < len(best):
            best = chosen
        if len(best) == fewest:
            break
    return best


@dataclass
class Result:
    """What one run came to. worst: the largest share of what parity allows."""

    setting: Setting
    passed: int
    failed: list[str]
    worst: float
    seconds: float


def run(setting: Setting, every: int) -> Result:
    """One run of the tests in processes of their own."""
    env = {k: v for k, v in os.environ.items() if k not in setting}
    env |= {k: v for k, v in setting.items() if v and k != "SEED"}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider"]
        command += [f"--junitxml={report}", "-m", "not slow", "--seed", setting["SEED"], "--every", str(every), *TESTS]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if not report.exists():
            return Result(setting, 0, ["pytest: " + (done.stdout + done.stderr)[-300:]], float("nan"), 0.0)
        cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    ratios = [r["ratio"] for c in cases for p in c.iter("property") for r in json.loads(p.get("value", "[]"))]
    failed = [c.get("name", "") for c in bad] or (["pytest: " + done.stdout[-300:]] if done.returncode else [])
    passed = sum(c.find("skipped") is None for c in cases) - len(bad)
    return Result(setting, passed, failed, max(ratios, default=float("nan")), time.monotonic() - begin)


def log(results: list[Result], planned: int, every: int) -> str:
    """The results as a page of docs."""
    names = list(results[0].setting)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    versions = ", ".join(f"{p} {version(p)}" for p in ("torch", "numpy", "triton"))
    lines = [
        "# Numeric tests under other settings of the libraries",
        "",
        "Generated by `tests/numeric_cover.py` (in `make test-all`): every pair of values meets in a run. A run takes",
        f"{'each case' if every == 1 else f'every {every}th case'} of parity and the other numeric tests whole; its"
        " largest ratio is the largest share of what the rule allows.",
        "",
        f"{datetime.date.today()}, commit {commit.stdout.strip() or 'unknown'}, {versions}, Python"
        f" {platform.python_version()}, {processor()[0]}: {len(results)} of {planned} runs.",
        "",
        "| " + " | ".join([*(f"`{n}`" if n != "SEED" else "seed" for n in names), "passed", "failed", "ratio"]) + " |",
        "|---" * (len(names) + 3) + "|",
    ]
    for r in results:
        cells = [*(r.setting[n] or "not set" for n in names), str(r.passed), str(len(r.failed)), f"{r.worst:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {name}" for r in results for name in r.failed)]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """The command at this file's head."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", help="numbers of the runs to do, from 1 on; default: all")
    parser.add_argument("--every", type=int, default=4, help="take every n-th case of parity (default: 4)")
    parser.add_argument("--log", type=Path, default=ROOT / "docs" / "numeric-cover.md", help="file to write")
    args = parser.parse_args()
    settings = cover(factors(processor()[1]))
    assert len(settings) <= MOST_RUNS, f"{len(settings)} runs"
    wanted = [int(n) for n in args.runs.split(",")] if args.runs else range(1, len(settings) + 1)
    if bad := [n for n in wanted if not 1 <= n <= len(settings)]:
        parser.error(f"--runs: {bad[0]} is not from 1 to {len(settings)}")
    results: list[Result] = []
    for n in wanted:
        results.append(run(settings[n - 1], args.every))
        r = results[-1]
        said = " ".join(f"{k}={v}" for k, v in r.setting.items() if v)
        print(f"{n}: {said}: {r.passed} passed, {len(r.failed)} failed, ratio {r.worst:.3f}, {r.seconds:.0f} s")
        print(*(f"   {name}" for name in r.failed), sep="\n", end="", flush=True)
        args.log.write_text(log(results, len(settings), args.every), encoding="utf-8")
    return 1 if any(r.failed for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
