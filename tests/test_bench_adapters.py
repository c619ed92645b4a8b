"""`fastgpt bench adapters` on a tiny model: its rows, and that each row of the batch has the adapter it should."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from fastgpt.bench import adapters
from fastgpt.bench.generators import SHAPES
from fastgpt.bench.results import read_rows


def test_three_variants_are_timed(tmp_path: Path) -> None:
    file, threads = tmp_path / "rows.jsonl", torch.get_num_threads()
    try:
        arguments = ["--quick", "--batch", "4", "--count", "2", "--device", "cpu", "--threads", "1"]
        assert adapters.main([*arguments, "--json", str(file)]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = read_rows([str(file)])
    assert [row["variant"] for row in rows] == list(adapters.VARIANTS)
    assert [row.get("reference") for row in rows] == [None, "base", "base"] and all(row["ms"] > 0 for row in rows)


def test_rows_are_shared_among_the_adapters() -> None:
    names = ["a", "b", "c", "d"]
    used = {v: Counter(r.adapter for r in adapters.requests(v, names, SHAPES["tiny"], 8)) for v in adapters.VARIANTS}
    assert used == {"base": {None: 8}, "loaded": {None: 8}, "adapters": dict.fromkeys(names, 2)}
