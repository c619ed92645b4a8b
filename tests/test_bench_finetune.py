"""Fine-tuning against TRL on a tiny model: both sides do the same work, and the table shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastgpt.bench import finetune, readme
from fastgpt.bench.results import read_rows

pytest.importorskip("trl"), pytest.importorskip("peft")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow if k == "sft" else pytest.mark.extended) for k in finetune.SIDES]
)
def test_both_sides_have_the_same_losses(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    arguments = ["--quick", "--shape", "tiny-llama", "--kind", kind, "--threads", "1", "--json", str(file)]
    assert finetune.main(arguments) == 0
    ours, *others = read_rows([str(file)])
    assert [row["variant"] for row in others][-1].startswith("trl")
    for theirs in others:
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4) and len(ours["losses"]) == 3
    assert "times as fast" in capsys.readouterr().out
    head, first, *more = readme.readme_finetune([ours, *others])
    assert first[2] == "fastgpt" and all(len(line) == len(head) for line in (first, *more))
    trl = next(line for line in more if line[2] == "trl")
    assert trl[6:8] == ["-", "-"] and (first[8] == "-") == (kind != "distil")
