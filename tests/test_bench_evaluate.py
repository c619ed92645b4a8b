"""Evaluation against lm_eval's own model on a tiny model: both sides score the same, and the table shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastgpt.bench import evaluate, readme
from fastgpt.bench.results import read_rows

pytest.importorskip("lm_eval"), pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.parametrize("kind", evaluate.KINDS)
def test_both_sides_score_the_same(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    assert evaluate.main(["--quick", "--kind", kind, "--questions", "3", "--rounds", "1", "--json", str(file)]) == 0
    ours, *theirs = read_rows([str(file)])
    assert ours["difference"] < 1e-4 and ours["requests"] == 12
    assert all(row["tokens_per_request"] > 2 * ours["tokens_per_request"] for row in theirs[1:])
    assert "times as fast" in capsys.readouterr().out
    head, first, *others = readme.readme_evaluate([row | {"shape": "gpt2-124m"} for row in (ours, *theirs)])
    assert first[1] == "fastgpt" and len(first) == len(head) and [row[-1] for row in others] == ["-", "-"]


def test_words_are_tokens() -> None:
    words = evaluate.Words(30, 1.0)
    assert len(words.words) == 30 and len(words.tokenizer.encode(f" {words.text(9, 9)}")) == 9
    pairs = evaluate.mmlu(words, 2)
    assert len(pairs) == 8 and pairs[0][0] == pairs[3][0] and all(len(words.tokenizer.encode(b)) == 1 for _, b in pairs)
