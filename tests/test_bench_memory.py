"""What fits: the bisection finds the limit, plans reach it, and steps that run out of memory move it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt.bench import _harness, memory, variants
from fastgpt.core.errors import UserError
from fastgpt.training.memory import LEVELS, shape_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("edge", [0, 1, 2, 7, 8, 1000])
@pytest.mark.parametrize("guess", [0, 1, 7, 600])
def test_the_largest_is_found_from_any_guess(edge: int, guess: int) -> None:
    asked: list[int] = []

    def fits(n: int) -> bool:
        asked.append(n)
        assert n >= 1
        return n <= edge

    assert memory.largest(fits, guess) == edge
    assert len(asked) == len(set(asked)) <= 24


@pytest.mark.parametrize("model", ["gpt2-774m", "llama-125m"])
def test_a_plan_is_on_the_edge(model: str) -> None:
    target = memory.card(40)
    for level in LEVELS:
        cfg, found = memory.config_of(model, level), memory.planned(model, level, 40)
        for b, t in ((found["largest_batch"], cfg.block_size), (1, found["longest_context"])):
            assert memory.planned_peak(memory.sized(cfg, b, t), target) <= target.usable
        for b, t in ((found["largest_batch"] + 1, cfg.block_size), (1, found["longest_context"] + memory.UNIT)):
            assert memory.planned_peak(memory.sized(cfg, b, t), target) > target.usable
    assert found["largest_batch_peak_gb"] * 1e9 <= target.usable < 40e9


@pytest.mark.parametrize("model", ["gpt2-124m", "llama-125m"])
def test_shapes_at_any_length_are_the_models(model: str) -> None:
    cfg = memory.config_of(model, "none")
    for t in (256, 1024, 3072):
        sized = memory.sized(cfg, 1, t)
        assert memory.shape_at(sized) == shape_of(sized)


def test_more_memory_and_more_recomputation_hold_more() -> None:
    found = {(level, gb): memory.planned("gpt2-350m", level, gb) for level in LEVELS for gb in memory.CARDS_GB}
    for key in ("largest_batch", "longest_context"):
        for level in LEVELS:
            row = [found[level, gb][key] for gb in memory.CARDS_GB]
            assert row == sorted(set(row))
        assert found["none", 24][key] < found["norms", 24][key] < found["block", 24][key]
    assert memory.planned("gpt2-1.5b", "block", 24)["largest_batch"] == 0, "16 bytes a parameter are more than 24 GB"


def test_real_steps_fit_or_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run two steps of the trainer on the CPU; a failed allocation is not an error, any other failure is."""
    small = replace(variants.settings(variants.SHAPES["small"], CPU), recompute="block")
    monkeypatch.setattr(variants, "keep_freed_memory", lambda: None)
    cfg = memory.sized(small, 2, 16)
    assert memory.step_fits(cfg, CPU)
    build, sizes = variants.build, []

    def limited(name: str, cfg: Any, data: Any) -> Any:
        sizes.append(data[0][0].shape)
        if data[0][0].numel() > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(name, cfg, data)

    monkeypatch.setattr(variants, "build", limited)
    assert memory.largest(lambda b: memory.step_fits(memory.sized(small, b, 16), CPU)) == 2
    assert (2, 16) in sizes and (3, 16) in sizes
    monkeypatch.setattr(variants, "build", lambda *args: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        memory.step_fits(cfg, CPU)


def test_measured_rows_hold_the_allocator_to_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda f, device: fractions.append(f))
    monkeypatch.setattr(memory, "total_memory", lambda device: int(80e9))
    monkeypatch.setattr(memory, "step_fits", lambda cfg, device: cfg.sequences * cfg.block_size <= 70 * 1024)
    found = memory.measured("gpt2-124m", "none", 24, CPU)
    assert (found["figure"], found["largest_batch"], found["longest_context"]) == ("measured", 70, 70 * 1024)
    assert fractions == [pytest.approx(0.92 * 24 / 80), 1.0]


def test_rows_are_labelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    command = ["--model", "gpt2-124m", "--gb", "24", "--gb", "80", "--device", "cpu", "--json", str(file)]
    assert memory.main(command) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(r["mode"], r["memory_gb"]) for r in rows} == {(level, gb) for level in LEVELS for gb in (24, 80)}
    assert all(r["figure"] == "planned" and "batch" not in r and r["block"] == 1024 for r in rows)
    assert all(r["machine"][key] for r in rows for key in _harness.PROVENANCE)
    assert f"{rows[0]['largest_batch']:,}, {rows[0]['longest_context']:,}" in capsys.readouterr().out
    with pytest.raises(UserError, match="memory: --measure needs a GPU"):
        memory.main(["--measure", "--device", "cpu"])
