"""The command `fastgpt parity`: run every case of every op on every backend, print the worst ratios first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from fastgpt.core import backend
from fastgpt.core.command import Parser, number
from fastgpt.parity import jobs as jobs_of
from fastgpt.parity.rule import Row
from fastgpt.parity.table import SUBJECTS, backends_here, layouts


def run_all(only: list[str], jobs: int = 1) -> Iterator[Row]:
    """Run all cases of the ops and backends in `only` (empty: all) that this machine has, in `jobs` processes."""
    wanted = [op for op in SUBJECTS if op in only] or list(SUBJECTS)
    names = [b for b in backend.BACKENDS if b in only] or list(backend.BACKENDS)
    return jobs_of.run(
        jobs_of.pieces([(op, name) for op in wanted for name in backends_here(op) if name in names]), jobs
    )


def keep(rows: Iterable[Row], path: Path | None) -> Iterator[Row]:
    """Yield the rows, and write each to `path` at once, with four digits: the rows of a GPU take about 7 MB."""
    with open(os.devnull if path is None else path, "w", encoding="utf-8") as f:
        for row in rows:
            short = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in asdict(row).items()}
            f.write(json.dumps(short, separators=(",", ":")) + "\n")
            f.flush()
            yield row


def missing_cells(rows: list[Row]) -> list[str]:
    """Return the cells of the registry (op, backend, dtype, layouts) that run here and that no row covers."""
    seen = {(r.op, r.backend, r.dtype, r.layouts) for r in rows}
    wanted = {
        (op, name, str(dtype).split(".")[1], f"{layout}/{grad_layout}")
        for op in backend.ops()
        if len(backend.ops()[op]) > 1
        for name in backends_here(op)
        for dtype in backend.ops()[op][name].dtypes
        for layout, grad_layout in (layouts(op) if op in SUBJECTS else [("any", "any")])
    }
    return sorted(" ".join(cell) for cell in wanted - seen)


def main(argv: list[str] | None = None) -> int:
    """Run the cases and print the table; return 1 if a ratio is over 1 or a cell is missing."""
    parser = Parser(prog="fastgpt parity", description="errors against fp64, as a share of what is allowed")
    parser.add_argument("only", nargs="*", help="ops or backends; default: all that run here")
    parser.add_argument("--json", type=Path, help="write every row to this file as it comes, one a line")
    parser.add_argument("--jobs", type=number(int, 1), default=1, help="processes that share the cases (default: 1)")
    parser.add_argument("--top", type=number(int, 0), default=20, help="rows to print")
    args = parser.parse_args(argv)
    if unknown := [o for o in args.only if o not in SUBJECTS and o not in backend.BACKENDS]:
        parser.error(f"{unknown[0]} is neither an op with kernels ({', '.join(SUBJECTS)}) nor a backend")
    if not torch.cuda.is_available() and not backend.interpreting():
        again = [sys.executable, "-m", "fastgpt.parity", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.call(again, env={**os.environ, "TRITON_INTERPRET": "1"})  # must be set before Triton's import
    rows = sorted(keep(run_all(args.only, args.jobs), args.json), key=lambda r: -r.ratio)
    for r in rows[: args.top]:
        print(f"{r.ratio:6.3f}  {r.backend:<7} {r.output:<12} error {r.error:.2e}  allowed {r.allowed:.2e}  {r.case}")
    over, missing = [r for r in rows if not r.ratio <= 1], [] if args.only else missing_cells(rows)
    for cell in missing:
        print(f"missing: {cell}")
    print(f"{len(rows)} figures, {len(over)} over the bound, {len(missing)} cells missing")
    return 1 if over or missing or not rows else 0
