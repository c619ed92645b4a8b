"""The table of `fastgpt parity`: every case of every op on every backend, worst ratio to the bound first."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.core import backend
from fastgpt.core.command import Parser, number
from fastgpt.parity import activations, adamw, attention, cross_entropy, linear_cross_entropy, norms, positions
from fastgpt.parity.inputs import Inputs
from fastgpt.parity.rule import REPEATED, SHIFTS, Case, Outputs, Row, Subject, allowed_error

FAMILIES = (norms, cross_entropy, linear_cross_entropy, activations, positions, attention, adamw)
SUBJECTS: dict[str, Subject] = {op: subject for family in FAMILIES for op, subject in family.SUBJECTS.items()}


@dataclass(frozen=True)
class Expected:
    """What every backend's outputs of one case are held against: the exact ones and, by name, what PyTorch's own op
    and (fp32 outputs) the rounding of the inputs come away with."""

    truth: Outputs
    torch_errors: dict[str, float]
    sensitivities: dict[str, float]


def expected(case: Case, device: str = "cpu") -> Expected:
    """Run the reference in fp64 and the baseline; once for all backends.

    Raises:
        AssertionError: the reference and the baseline differ in their outputs.
    """
    subject, torch_backend = SUBJECTS[case.op], {case.op: "torch"}
    baseline = subject.run(case, subject.torch, Inputs(case, device, wide=False))
    with backend.use(**torch_backend):  # type: ignore[arg-type]
        truth = subject.run(case, subject.reference, Inputs(case, device, wide=True))
        assert truth.keys() == baseline.keys(), (baseline.keys(), truth.keys())
        single = [name for name, t in baseline.items() if t.dtype == torch.float32 and t.numel()]
        sensitivities = dict.fromkeys(truth, 0.0)
        for shift in range(1, SHIFTS + 1 if single else 1):
            moved = subject.run(case, subject.reference, Inputs(case, device, wide=True, shift=shift))
            for name in single:
                sensitivities[name] = max(sensitivities[name], _error(moved[name], truth[name]))
    return Expected(truth, {name: _error(t, truth[name]) for name, t in baseline.items()}, sensitivities)


def compare(case: Case, name: str, wanted: Expected, device: str = "cpu") -> list[Row]:
    """Run one case on one backend; one row per output, and one per input that was written to or over.

    Raises:
        AssertionError: an output's shape is not the reference's.
    """
    subject = SUBJECTS[case.op]
    choice: dict[str, Any] = {case.op: name}
    with backend.use(strict=True, **choice):
        inputs = Inputs(case, device, wide=False)
        ours = subject.run(case, subject.ours, inputs)
    assert ours.keys() == wanted.truth.keys(), (ours.keys(), wanted.truth.keys())
    dtype = str(case.dtype).split(".")[1]
    rows = [
        Row(case.op, name, dtype, case.layouts, str(case), what + " overwritten", math.inf, 0.0, 0.0)
        for what in inputs.harmed()
    ]
    for output, exact in wanted.truth.items():
        got, torch_error, sensitivity = ours[output], wanted.torch_errors[output], wanted.sensitivities[output]
        assert got.shape == exact.shape, f"{case} {output}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
        limit = allowed_error(output, exact, max(torch_error, sensitivity), got.dtype)
        error = _error(got, exact)
        rows.append(Row(case.op, name, dtype, case.layouts, str(case), output, error, torch_error, limit, sensitivity))
    return rows


def check(case: Case, name: str, device: str = "cpu") -> list[Row]:
    """`expected` and `compare` for one case on one backend."""
    return compare(case, name, expected(case, device), device)


def _error(got: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; equal infinities and NaN in both places count as equal, NaN in one as NaN."""
    if not exact.numel():
        return 0.0
    wide, exact = got.detach().double(), exact.detach()
    same = (wide == exact) | (wide.isnan() & exact.isnan())
    return float(torch.where(same, 0.0, (wide - exact).abs()).max())


def layouts(op: str) -> list[tuple[str, str]]:
    """Every layout of the op's inputs with every layout of its upstream gradient."""
    return list(itertools.product(SUBJECTS[op].layouts, SUBJECTS[op].grad_layouts))


def cases(op: str) -> Iterator[Case]:
    """Every case of an op once, for all kernel dtypes: the base shapes through the layouts, then the variants."""
    yield from dict.fromkeys(_cases(op))


def _cases(op: str) -> Iterator[Case]:
    subject = SUBJECTS[op]
    for dtype in backend.KERNEL_DTYPES:
        for i, (shape, options) in enumerate(subject.bases(dtype)):
            for layout, grad_layout in layouts(op):
                if i == 0 or ("contiguous" in (layout, grad_layout) and not {layout, grad_layout} & set(REPEATED)):
                    yield Case(op, dtype, layout, shape, tuple(options.items()), grad_layout)
        for shape, options in subject.variants(dtype):
            yield Case(op, dtype, "contiguous", shape, tuple(options.items()))


def backends_here(op: str) -> list[str]:
    """Kernel backends of `op` that run on this machine (on a CPU also those that are simulated there)."""
    on_gpu = torch.cuda.is_available()
    names = [b for b in backend.ops()[op] if b != "torch" and backend.missing(b) is None]
    return [b for b in names if (backend.DEVICE_OF[b] == "cuda") == on_gpu or backend.simulated(b)]


def takes(name: str, case: Case) -> bool:
    """Whether the case's dtype is one that this backend has a kernel for."""
    return backend.ops()[case.op][name].takes(case.dtype, 0)


def run_all(only: list[str], jobs: int = 1) -> Iterator[Row]:
    """All cases of the ops and backends in `only` (empty: all) that run here, in so many processes."""
    from fastgpt.parity.jobs import pieces, run  # it imports this module

    wanted = [op for op in SUBJECTS if op in only] or list(SUBJECTS)
    names = [b for b in backend.BACKENDS if b in only] or list(backend.BACKENDS)
    return run(pieces([(op, name) for op in wanted for name in backends_here(op) if name in names]), jobs)


def keep(rows: Iterable[Row], path: Path | None) -> Iterator[Row]:
    """The rows, each written to `path` as it comes; numbers have four digits there, so that a GPU's take about 7 MB."""
    with open(os.devnull if path is None else path, "w", encoding="utf-8") as f:
        for row in rows:
            short = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in asdict(row).items()}
            f.write(json.dumps(short, separators=(",", ":")) + "\n")
            f.flush()
            yield row


def missing_cells(rows: list[Row]) -> list[str]:
    """Cells of the registry (op x backend x dtype x both layouts) that run here and that no row covers."""
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
    """`fastgpt parity`: run the cases, print the table; 1 if a ratio is over 1 or a cell is missing."""
    parser = Parser(prog="fastgpt parity", description="errors against fp64, as a share of what is allowed")
    parser.add_argument("only", nargs="*", help="ops or backends; default: all that run here")
    parser.add_argument("--json", type=Path, help="write every row to this file as it comes, one a line")
    parser.add_argument("--jobs", type=number(int, 1), default=1, help="processes that share the cases (default: 1)")
    parser.add_argument("--top", type=number(int, 0), default=20, help="rows to print")
    args = parser.parse_args(argv)
    if unknown := [o for o in args.only if o not in SUBJECTS and o not in backend.BACKENDS]:
        parser.error(f"{unknown[0]} is neither an op with kernels ({', '.join(SUBJECTS)}) nor a backend")
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}, expected at least 1")
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
