"""`fastgpt eval score` prints the metrics of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from suite_files import write_rows

from fastgpt.core.errors import UserError
from fastgpt.evaluate import score

ROWS = [
    {"prediction": "the cat sat", "reference": "the cat sat"},
    {"prediction": "今天 很好", "reference": ["明天 很好", "no"], "id": 2},
]


def test_the_command_prints_metrics_and_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "p.jsonl", ROWS)
    assert score.main([str(tmp_path / "p.jsonl"), "--metric", "f1", "exact_match", "--tokenizer", "unicode"]) == 0
    # 3 of 4 characters of the second are right; tokenizer is an option of f1 alone
    assert capsys.readouterr().out.splitlines() == [
        "f1           0.8750  ± 0.1250  (2 items)",
        "exact_match  0.5000  ± 0.5000  (2 items)",
    ]
    assert score.main([str(tmp_path / "p.jsonl"), "--metric", "f1"]) == 0
    assert "note: f1: 2 of 5 texts are in scripts without spaces" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "argv", "error"),
    [
        (ROWS, ["--metric", "exact_match", "--tokenizer", "char"], "--tokenizer has no effect on exact_match"),
        (ROWS, ["--metric", "f1", "--tokenizer", "zh"], "tokenizer of f1 is 'zh'"),
        (ROWS, ["--metric", "f2"], "invalid choice: 'f2'"),
        ([ROWS[0], {"prediction": "a"}], ["--metric", "f1"], "p.jsonl:2: expected prediction, a text, and ref"),
        ([["a"]], ["--metric", "f1"], ":1 is .*, expected a JSON object"),
        ([], ["--metric", "f1"], "got 0 predictions"),
    ],
)
def test_wrong_input(rows: list[Any], argv: list[str], error: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "p.jsonl", rows)
    with pytest.raises(UserError, match=error):
        score.main([str(tmp_path / "p.jsonl"), *argv])
