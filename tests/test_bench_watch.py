"""`fastgpt bench watch`: its rows; that no answer is flagged it checks for itself."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("re2")

from fastgpt.bench import watch
from fastgpt.bench.results import read_rows


def test_all_variants_are_timed(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    assert watch.main(["--rounds", "2", "--json", str(file)]) == 0
    rows = read_rows([str(file)])
    assert [row["variant"] for row in rows] == list(watch.VARIANTS)
    assert [row.get("reference") for row in rows] == [None, *["off"] * 3] and all(row["us"] > 0 for row in rows)
