"""Fine-tuning against TRL on a tiny model: both sides do the same work, and the table shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastgpt.bench import finetune, report
from fastgpt.bench.results import read_rows

pytest.importorskip("trl"), pytest.importorskip("peft")


@pytest.mark.parametrize("kind", finetune.KINDS)
@pytest.mark.slow
def test_both_sides_have_the_same_losses(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    arguments = ["--quick", "--shape", "tiny-llama", "--kind", kind, "--threads", "1", "--json", str(file)]
    assert finetune.main(arguments) == 0
    ours, theirs = read_rows([str(file)])
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4) and len(ours["losses"]) == 3
    assert "times as fast" in capsys.readouterr().out
    head, first, second = report.readme_finetune([ours, theirs])
    assert first[2] == "fastgpt" and second[-1] == "-" and len(first) == len(head)
