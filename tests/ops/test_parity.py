"""Every op, backend, dtype and layout against the fp64 reference, by the rule of fastgpt/parity."""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import parity
from fastgpt.core import backend
from fastgpt.parity import command, jobs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERY = [
    (case, names)
    for op in parity.SUBJECTS
    for case in parity.cases(op)
    if (names := [name for name in parity.backends_here(op) if parity.takes(name, case)])
]


# products in the interpreter take the longest
INTERPRETED = [case for case, names in EVERY if case.op in ("gelu_mlp", "linear_qkv") and names == ["triton"]]
MARKS = {
    case: [pytest.mark.extended if number % 4 else pytest.mark.slow]
    for number, case in enumerate(INTERPRETED)
    if DEVICE == "cpu" and number % 8
}


@pytest.mark.parametrize(
    "case,names",
    [pytest.param(*both, marks=MARKS.get(both[0], [])) for both in EVERY],
    ids=[str(case) for case, _ in EVERY],
)
def test_parity(case: parity.Case, names: list[str], seed: int, record_property: Callable[[str, object], None]) -> None:
    """Run one case on all its backends; truth and baseline are computed once."""
    case = dataclasses.replace(case, seed=seed)
    wanted = parity.expected(case, DEVICE)
    rows = [row for name in names for row in parity.compare(case, name, wanted, DEVICE)]
    record_property("parity", json.dumps([asdict(r) for r in rows]))
    over = [f"{r.backend} {r.output}: error {r.error:.3e}, allowed {r.allowed:.3e}" for r in rows if not r.ratio <= 1]
    assert not over, f"{case}: {over}"


def test_every_cell_has_a_case() -> None:
    covered = {(c.op, name, c.dtype, c.layout, c.grad_layout) for c, names in EVERY for name in names}
    for op, cells in backend.ops().items():
        for name in [b for b in cells if b in parity.backends_here(op)]:
            for dtype in cells[name].dtypes:
                for both in parity.layouts(op):
                    assert (op, name, dtype, *both) in covered


@pytest.mark.parametrize("op", parity.SUBJECTS)
def test_every_op_has_400_cases(op: str) -> None:
    """Count every combination of dtype, layout, shape and options once, on the backends of a machine without a GPU."""
    kernels = {name for name in backend.ops()[op] if name not in ("torch", "cuda")}
    if kernels - set(parity.backends_here(op)):
        pytest.skip(f"{op}: not every backend is here")
    cases = [str(case) for case in parity.cases(op)]
    assert len(set(cases)) == len(cases)
    assert len(cases) * len(kernels) >= 400, f"{op}: {len(cases)} cases on each of {kernels}"


def test_the_rule_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A LayerNorm with a relative error of 1e-3 exceeds the bound in fp32."""
    truth = parity.SUBJECTS["layer_norm"]
    wrong = dataclasses.replace(truth, ours=lambda *a, **k: tuple(1.001 * t for t in truth.torch(*a, **k)))
    monkeypatch.setitem(parity.SUBJECTS, "layer_norm", wrong)
    case = next(c for c in parity.cases("layer_norm") if c.dtype == torch.float32)
    assert max(r.ratio for r in parity.check(case, "torch")) > 1


@pytest.mark.parametrize("op", ["attention", "rms_norm", "cross_entropy"])
def test_sensitivity_hides_no_fault(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of 8 units in the last place of the output's scale exceeds the bound in fp32."""
    right = parity.SUBJECTS[op]

    def run(case: parity.Case, fn: Callable[..., object], inputs: parity.Inputs) -> parity.Outputs:
        found = right.run(case, fn, inputs)
        units = 8 * 2.0**-23 if fn is right.ours else 0.0
        return {name: t + units * t.abs().max() for name, t in found.items()}

    monkeypatch.setitem(parity.SUBJECTS, op, dataclasses.replace(right, run=run))
    case = next(c for c in parity.cases(op) if c.dtype == torch.float32)
    assert min(r.ratio for r in parity.check(case, "torch")) > 1


def test_a_lucky_draw_of_the_baseline_is_no_bound() -> None:
    """In this draw of 13 equal rows PyTorch's error is a quarter of a unit, by luck; in others it is more."""
    options = (("bias", True), ("chunk", 13), ("reduction", "none"))
    case = parity.Case("linear_cross_entropy", torch.float16, "expanded", (13, 16, 61), options, "rows")
    for name in parity.backends_here(case.op):
        assert max(r.ratio for r in parity.check(dataclasses.replace(case, seed=2), name, DEVICE)) <= 1


def test_nan_is_over_the_bound() -> None:
    row = parity.Row("op", "cpu", "float32", "contiguous/contiguous", "case", "y", float("nan"), 0.0, 1.0)
    assert not row.ratio <= 1


def test_command_writes_the_table_and_names_missing_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backend, "interpreting", lambda: True)
    monkeypatch.setattr(command, "run_all", lambda only, jobs: parity.check(next(parity.cases("adamw")), "torch"))
    monkeypatch.setattr(command, "backends_here", lambda op: ["triton"] if "triton" in backend.ops()[op] else [])
    assert parity.main(["--json", str(tmp_path / "table.json")]) == 1
    assert "missing: adamw triton float32 contiguous/transposed" in capsys.readouterr().out
    assert {"ratio", "error", "allowed", "case"} <= json.loads(
        (tmp_path / "table.json").read_text().splitlines()[0]
    ).keys()


def test_rows_are_on_disk_when_they_come(tmp_path: Path) -> None:
    """A row is in the file before the next case begins, whatever ends the command. All rows of a GPU fit in 16 MB."""
    path, row = tmp_path / "rows.jsonl", parity.Row("op", "cpu", "float32", "a/b", "case", "y", 1 / 3, 0.0, 1.0)
    for number, _ in enumerate(command.keep(iter([row] * 3), path), 1):
        assert len(path.read_text().splitlines()) == number
    assert json.loads(path.read_text().splitlines()[0])["error"] == 0.3333
    assert 30_000 * len(path.read_text()) / 3 < 16e6


WORKER = """
import os
from fastgpt.parity import jobs, table

usual = table.check
def check(case, name, device):
    number = jobs.cases_of("embedding", "torch").index(case)
    if number == 1:
        raise ValueError("broken")
    if number == 4:
        os._exit(9)
    return usual(case, name, device)

table.check = check
answers = [True, True, False, True]
jobs.usable = lambda: answers.pop(0)
jobs.main()
"""


def test_a_case_that_ends_its_process_costs_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 1 raises, the device stops responding after case 2, and case 4 kills its process."""
    started: list[subprocess.Popen[str]] = []

    def start(threads: int) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(subprocess.Popen([sys.executable, "-c", WORKER], **pipes))
        return started[-1]

    monkeypatch.setattr(jobs, "_start", start)
    rows = list(jobs.run([jobs.Piece("embedding", "torch", 0, 6)], 2))
    every = jobs.cases_of("embedding", "torch")
    assert {r.case: r.output for r in rows if r.ratio == math.inf} == {
        str(every[1]): "raised ValueError: broken",
        str(every[4]): "its process ended with code 9",
    }
    expected = [r for i in (0, 2, 3, 5) for r in parity.check(every[i], "torch")]
    assert [r for r in rows if r.ratio < math.inf] == expected
    assert len(started) == 3 and all(p.wait(5) is not None for p in started)


def test_pieces_hold_every_case_once_and_cuda_comes_first() -> None:
    pairs = [("attention", "triton"), ("adamw", "triton"), ("attention", "cuda")]
    found = jobs.pieces(pairs)
    assert [p.backend for p in found[:2]] == ["cuda", "cuda"] and found[-1].backend == "triton"
    for op, name in pairs:
        numbers = sorted(i for p in found if (p.op, p.backend) == (op, name) for i in range(p.first, p.last))
        assert numbers == list(range(len(jobs.cases_of(op, name))))
    assert max(p.last - p.first for p in found) <= jobs.PIECE
