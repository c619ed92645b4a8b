"""`fastgpt bench ab --base PYTHON OP ...`: is this install slower than another one? Both are measured alternately.

Each of the two interpreters runs the benchmark --runs times, alternately and each time in a new process, so neither
the machine's drift nor one process's memory layout decides. Rows go to A.jsonl (the base) and B.jsonl (this install)
in --out; then bench/compare.py judges them.

    fastgpt bench ab --base ../fastgpt-before/.venv/bin/python layer_norm --shape 1024x768
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from fastgpt.bench import compare
from fastgpt.bench.results import read_rows
from fastgpt.core.command import Parser, number
from fastgpt.core.errors import UserError

SIDES = ("A", "B")


def measure(commands: list[list[str]], bench: list[str], runs: int, out: Path) -> list[Path]:
    """Run `COMMAND -m fastgpt.bench.NAME ARGUMENTS` of both sides alternately, `runs` times; return the row files."""
    files = [out / f"{side}.jsonl" for side in SIDES]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
    for turn in range(runs):
        order = list(zip(commands, files))
        for command, file in order if turn % 2 == 0 else order[::-1]:
            whole = [*command, "-m", f"fastgpt.bench.{bench[0]}", *bench[1:], "--json", str(file)]
            done = subprocess.run(whole, capture_output=True, text=True)
            if done.returncode:
                last = (done.stdout + done.stderr).strip().splitlines()[-1:]
                raise UserError(f"ab: {shlex.join(whole)} ended with exit code {done.returncode}: {' '.join(last)}")
        print(f"run {turn + 1} of {runs}", file=sys.stderr, flush=True)
    return files


def main(argv: list[str] | None = None) -> int:
    """Return 1 for a regression."""
    parser = Parser(prog="fastgpt bench ab", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--base", required=True, metavar="PYTHON", help="interpreter of the other install")
    parser.add_argument("--runs", type=number(int, 1), default=5, help="number of processes per side")
    parser.add_argument("--floor", type=number(float, 0), default=compare.FLOOR, help="smallest change that counts")
    parser.add_argument("--out", type=Path, default=Path("bench-ab"), help="folder for the rows (default: bench-ab)")
    parser.add_argument("bench", nargs=argparse.REMAINDER, help="a benchmark and its arguments")
    args = parser.parse_args(argv)
    if not args.bench or args.runs < 1:
        raise UserError("ab: expected a benchmark, as in `layer_norm --shape 1024x768`, and --runs of at least 1")
    files = measure([shlex.split(args.base), [sys.executable]], args.bench, args.runs, args.out)
    a, b = (read_rows([str(file)]) for file in files)
    pairs, alone = compare.compare(a, b, args.floor)
    print(compare.show(pairs, alone, True))
    return compare.exit_code(pairs)
