"""The suite on another pair of torch and Triton: `python tests/versions.py PAIR [--env FOLDER] [--sample]`.

Installs the pair into .versions/PAIR (or uses the packages of the environment --env), builds the last commit in a clean
copy, runs `pytest -m "not slow"` there and writes the pair's row into docs/versions.md. --sample: a sample of the tests
in three minutes, and no row.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "versions.md"
PAIRS = ("oldest", "pinned", "newest")
WHOLE = ["-m", "not slow"]
SAMPLES = [
    ["-k", "norm or cross_entropy or attention or embedding", "--every", "60", "tests/ops/test_parity.py"],
    ["-m", "not slow", "tests/ops/test_contract.py", "tests/test_triton_kernels.py"],
    ["-k", "not compile_without_spills", "tests/test_triton_aot.py"],
]
HOT = r"attention_.*\[D=64 causal\]|(layer|rms)_norm_.*\[C=1024 full\]|cross_entropy_.*\[K=4096 full\]"
VERSIONS = "import sys, torch, triton; print(torch.__version__, triton.__version__, sys.version.split()[0])"
SITE = "import site; print(site.getsitepackages()[0])"


def requirements(pair: str) -> str:
    """Return the packages of requirements.txt and requirements-dev.txt, replaced where the pair's own file names
    them."""
    own = ROOT / f"requirements-{pair}.txt"
    instead = own.read_text().splitlines() if own.exists() else []
    name = re.compile(r"[\w.-]+")
    replaced = {m[0] for line in instead if (m := name.match(line))}
    lines = [line for f in ("requirements.txt", "requirements-dev.txt") for line in (ROOT / f).read_text().splitlines()]
    return "\n".join([*(line for line in lines if not (m := name.match(line)) or m[0] not in replaced), *instead])


def run(*command: str | Path, cwd: Path = ROOT, check: bool = True, **environment: str) -> int:
    """Run a command in a clean environment, without another Python's packages on the path; return the exit code."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | environment
    return subprocess.run([str(part) for part in command], cwd=cwd, env=env, check=check).returncode


def install(pair: str) -> Path:
    """Return .versions/PAIR with the pair's packages, created once and again when their list changes."""
    folder, wanted = ROOT / ".versions" / pair, requirements(pair)
    done = folder / "requirements.txt"
    if not done.exists() or done.read_text() != wanted:
        run(sys.executable, "-m", "venv", "--clear", folder)
        listed = folder / "wanted.txt"
        listed.write_text(wanted)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
        run(*pip, "--upgrade", "pip")
        run(*pip, "-r", listed, PIP_CONSTRAINT=os.devnull)  # a machine may cap torch; here the pair decides
        listed.rename(done)
    return folder


def build(env: Path, copy: Path, cuda: str) -> Path:
    """Build the last commit in `copy` against env's packages (cuda: FASTGPT_CUDA); return the Python to run it."""
    run("git", "clone", "--quiet", ROOT, copy)
    run(env / "bin" / "python", "-m", "venv", "--without-pip", copy / ".venv")
    python = copy / ".venv" / "bin" / "python"
    site, packages = (" ".join(said(p, SITE)) for p in (python, env / "bin" / "python"))
    (Path(site) / "pair.pth").write_text(f"import site; site.addsitedir({packages!r})\n")
    run(
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "-e",
        ".",
        cwd=copy,
        FASTGPT_CUDA=cuda,
    )
    return python


def pytest(python: Path, copy: Path, *arguments: str) -> int:
    command = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", *arguments]
    return run(*command, cwd=copy, check=False, OMP_NUM_THREADS="1")


def said(python: Path, code: str) -> list[str]:
    """Return the words that a line of Python prints."""
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def row(pair: str, python: Path, copy: Path, seconds: float) -> str:
    """Return the pair's row from junit.xml: date, commit, versions, passed, failed, skipped, seconds."""
    suite = next(ET.parse(copy / "junit.xml").iter("testsuite")).attrib
    failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
    passed = int(suite["tests"]) - failed - skipped
    versions = said(python, VERSIONS)
    git = ["git", "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(git, cwd=copy, check=True, capture_output=True, text=True).stdout.strip()
    cells = (datetime.date.today(), commit, pair, *versions, passed, failed, skipped, round(seconds))
    return f"| {' | '.join(map(str, cells))} |"


def with_row(text: str, pair: str, line: str) -> str:
    """Return the table with the pair's row replaced; rows in the order of PAIRS."""
    head, rule, rest = re.split(r"^(\| *-[-| ]*\|\n)", text, maxsplit=1, flags=re.MULTILINE)
    rows, after = re.fullmatch(r"((?:\|[^\n]*\n)*)(.*)", rest, flags=re.DOTALL).groups()  # type: ignore[union-attr]
    found = {r.split("|")[3].strip(): r for r in rows.splitlines()} | {pair: line}
    return head + rule + "".join(found[p] + "\n" for p in PAIRS if p in found) + after


def main() -> int:
    parser = argparse.ArgumentParser(description="run the suite on a pair of torch and Triton")
    parser.add_argument("pair", choices=PAIRS)
    parser.add_argument("--env", type=Path, help="an environment with the packages, used in place of .versions/PAIR")
    parser.add_argument("--sample", action="store_true", help="run a sample in three minutes, write no row")
    options = parser.parse_args()
    env = options.env.resolve() if options.env else install(options.pair)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "fastgpt"
        python = build(env, copy, "0" if options.sample else "auto")
        if options.sample:
            check = [python, "-m", "fastgpt.checks.triton", "--arch", "90", "--only", HOT]
            codes = [run(*check, cwd=copy, check=False), *(pytest(python, copy, *sample) for sample in SAMPLES)]
            return max(map(abs, codes))
        start = time.perf_counter()
        code = pytest(python, copy, *WHOLE, "--junitxml", "junit.xml")
        line = row(options.pair, python, copy, time.perf_counter() - start)
        TABLE.write_text(with_row(TABLE.read_text(), options.pair, line))
    print(line)
    return code


if __name__ == "__main__":
    sys.exit(main())
