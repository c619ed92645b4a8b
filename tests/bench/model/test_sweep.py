"""The sweep of attention's launch shapes: which are tried, how a launch changes, what is printed."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

from fastgpt.bench.model import sweep, tables  # noqa: E402
from fastgpt.bench.model.sweep import Shape  # noqa: E402
from fastgpt.bench.model.triton_launches import TritonLaunch  # noqa: E402

ONE = """
from fastgpt.bench.model import sweep

shape = sweep.in_use(sweep.recorded("A100", 64)["dq"][1])
print(*(sorted(row) for row in sweep.modelled(sweep.Job(("A100",), 64, "dq", shape))))
"""


def launch(**numbers: int) -> TritonLaunch:
    """768 heads of 1,024 queries and keys."""
    options = {"num_warps": 8, "num_stages": 2, "maxnreg": 128}
    return TritonLaunch(
        None, (8 * 768, 1, 1), {"BLOCK_M": 64, "BLOCK_N": 128, "T": 1024, "S": 1024, **numbers}, options
    )


def test_the_grid_follows_the_tile() -> None:
    """dK/dV has a program for each tile of keys, the others one for each tile of queries."""
    assert sweep.in_use(launch()) == Shape(64, 128, 8, 2, 128)
    found = sweep.reshaped("dkdv", launch(), Shape(32, 64, 4, 3))
    assert found.grid == (16 * 768, 1, 1) and found.options == {"num_warps": 4, "num_stages": 3}
    assert (found.numbers["BLOCK_M"], found.numbers["BLOCK_N"]) == (32, 64)
    found = sweep.reshaped("dq", launch(BLOCK_M=128), Shape(64, 32, 4, 2, 168))
    assert found.grid == (16 * 768, 1, 1) and found.options["maxnreg"] == 168


@pytest.mark.parametrize("kernel", sweep.KERNELS)
@pytest.mark.parametrize("head_dim", sweep.SHAPES)
def test_shapes_that_may_fit_are_tried(kernel: str, head_dim: int) -> None:
    shapes = list(sweep.candidates(kernel, head_dim))
    assert len(shapes) == len(set(shapes)) > 10 and not any(shape.registers for shape in shapes)
    rows = {shape.n if kernel == "dkdv" else shape.m for shape in shapes}
    assert max(rows) == 128 and min(rows) == (32 if kernel == "dkdv" else 64)
    assert Shape(128, 128, 4, 2) not in shapes or kernel == "fwd", "its scores alone are 256 registers of a thread"


@pytest.mark.parametrize(
    "registers, warps, limit",
    [(168, 8, 128), (172, 8, 128), (173, 8, 0), (220, 4, 168), (255, 4, 0), (150, 4, 128)],
)
def test_one_more_program_is_tried_where_few_registers_are_missing(registers: int, warps: int, limit: int) -> None:
    """A multiprocessor has 65,536 registers: two programs of 8 warps have 128 each, three of 4 warps 168."""
    row: dict[str, Any] = {"tile": [64, 64, warps, 2, 0], "registers_of_thread": registers}
    assert sweep.squeezed(row) == (Shape(64, 64, warps, 2, limit) if limit else None)
    assert sweep.squeezed({**row, "tile": [64, 64, warps, 2, 128]}) is None


def test_the_fastest_shapes_are_printed_and_the_one_in_use() -> None:
    about = {"figure": "tile", "chip": "A100", "kernel": "dq", "head_dim": 64, "limit": "issue", "blocks_per_sm": 2}
    about |= {"registers_of_thread": 128}
    rows = [{**about, "tile": [64, n, 4, 2, 0], "us": 100.0 + n, "in_use": n == 7} for n in range(8)]
    dropped = {**about, "tile": [1, 1, 4, 2, 0], "in_use": False, "red": "3 instructions that spill"}
    _, *lines = tables.shape_rows([*rows, dropped])
    assert [line[4] for line in lines] == ["0", "1", "2", "3", "4", "7"]
    assert lines[-1][-1] == "in use" and len({len(line) for line in tables.shape_rows(rows)}) == 1
    assert "model, not measured" in tables.text(rows)


@pytest.mark.slow
def test_a_shape_is_compiled_and_modelled() -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTGPT_EMULATED_CUDA")}
    done = subprocess.run([sys.executable, "-c", ONE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'us'" in done.stdout and "'blocks_per_sm'" in done.stdout and "'red'" not in done.stdout
