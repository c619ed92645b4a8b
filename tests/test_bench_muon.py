"""`fastgpt bench muon` on tiny matrices: its rows, the FLOP that it counts, and that a wrong result shows no speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgpt.bench import muon
from fastgpt.bench.results import read_rows

QUICK = "--quick --layers 2 --rounds 1 --threads 1 --device cpu".split()


@pytest.fixture(autouse=True)
def same_threads() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_three_variants_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    assert muon.main([*QUICK, "--json", str(file)]) == 0
    rows = {row["variant"]: row for row in read_rows([str(file)])}
    assert list(rows) == ["torch", "fastgpt", "matmul"] and all(row["ms"] > 0 for row in rows.values())
    assert rows["fastgpt"]["reference"] == "torch" and rows["matmul"]["pct_of_matmul"] == pytest.approx(100)
    assert "torch / fastgpt" in capsys.readouterr().out


def test_torchs_function_keeps_the_dtype_and_its_input() -> None:
    m = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = m.clone()
    found = muon.peer(m)
    assert found.dtype == torch.float64 and type(found) is Tensor and torch.equal(m, before)
    values = torch.linalg.svdvals(found)
    assert 0.6 < float(values.min()) and float(values.max()) < 1.2


def test_flop_of_gpt2_124m() -> None:
    unit = 2 * 768**3
    for dtype, ours in ((torch.float32, 73.25), (torch.bfloat16, 85.5)):
        matrices = [torch.empty(shape, dtype=dtype, device="meta") for shape in muon.shapes(768, 1)]
        counted = {name: count / unit for name, count in muon.flops(muon.jobs(matrices, dtype)).items()}
        assert counted == {"torch": 140, "fastgpt": ours, "matmul": 28}


def test_a_wrong_result_shows_no_speed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(matrices: Sequence[Tensor], precision: torch.dtype) -> list[Tensor]:
        return [1.01 * muon.peer(m) for m in matrices]

    monkeypatch.setattr(muon, "orthogonalise", wrong)
    assert muon.main(QUICK) == 1
    out = capsys.readouterr().out
    assert "RED, no speed is shown: 96 x 32: error" in out and " ms" not in out
