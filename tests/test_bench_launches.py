"""Launches of a training step: their number, that nothing superfluous is among them, and that each op launches on CUDA
what the count assumes."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastgpt.bench import launches
from fastgpt.core import backend

rows = functools.cache(launches.launch_rows)


def part(name: str, accumulation: int = 1) -> Iterator[dict[str, Any]]:
    yield from (r for r in rows(accumulation) if r["part"] == name)


def test_launches_of_a_step() -> None:
    """More launches than these need a reason."""
    layer = {r["phase"]: r["own"] + r["library"] for r in part("layer")}
    ends = {r["phase"]: r["own"] + r["library"] for r in part("ends")}
    assert layer["start"] == layer["optimizer"] == 0 and layer["forward"] <= 8 and layer["backward"] <= 18
    assert ends["start"] <= 3 and ends["forward"] <= 8 and ends["backward"] <= 13 and ends["optimizer"] <= 20
    (optimizer,) = (r for r in part("ends") if r["phase"] == "optimizer")
    assert optimizer["own"] == 2, "clip and update"
    for whole, one, rest in zip(part("step"), part("layer"), part("ends")):
        assert (
            whole["own"] == 12 * one["own"] + rest["own"] and whole["library"] == 12 * one["library"] + rest["library"]
        )


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_micro_step_fills_clones_and_scales_nothing(accumulation: int) -> None:
    """The gradient of the loss contains the step's share, buffers are written by the first micro-step."""
    superfluous = {f"aten::{name}" for name in ("clone", "zeros", "ones", "ones_like", "fill_", "div", "copy_")}
    for r in (*part("layer", accumulation), *part("ends", accumulation)):
        if r["phase"] in ("forward", "backward"):
            assert not superfluous & set(r["calls"]) and "scale_rows" not in r["calls"]


def test_a_micro_step_more_adds_its_launches_alone() -> None:
    one, three = ({r["phase"]: r for r in part("step", n)} for n in (1, 3))
    assert three["optimizer"]["calls"] == one["optimizer"]["calls"]
    assert three["forward"]["own"] == 3 * one["forward"]["own"]


@pytest.mark.skipif(
    importlib.util.find_spec("pybind11") is None or shutil.which("g++") is None or not backend.simulated("cuda"),
    reason="needs the emulation of CUDA",
)
def test_each_op_launches_what_the_count_assumes(monkeypatch: pytest.MonkeyPatch) -> None:
    import emulator

    kernels = emulator.load(Path(os.environ["FASTGPT_EMULATED_CUDA"]))
    found: dict[str, set[int]] = {}

    class Measured(launches.Trace):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            before = kernels.n_launches()
            out = super().__torch_dispatch__(func, types, args, kwargs)
            namespace, _, name = func._schema.name.partition("::")
            if namespace == "fastgpt":
                found.setdefault(name, set()).add(kernels.n_launches() - before)
            return out

    monkeypatch.setattr(launches, "Trace", Measured)
    calls = launches.trace(1, 2, kernels="cuda")
    assert {name for _, name in calls if not name.startswith("aten::")} == set(found)
    tokens = launches.SHAPE.batch * launches.SHAPE.block
    assert found == {name: {launches.own_kernels(name, tokens)} for name in found}


def test_the_table_names_every_call(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert launches.main(["--json", str(tmp_path / "rows.jsonl")]) == 0
    out = capsys.readouterr().out
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 3 * len(launches.PHASES)
    assert "layer backward: " in out and "adamw_prepare, adamw_update" in out
