"""`fastgpt init`: recipes that `fastgpt finetune` reads, questions, and what is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import pytest

from fastgpt.core.errors import UserError
from fastgpt.data.read.rows import Row
from fastgpt.finetune import formats, goal
from fastgpt.finetune.config import FinetuneConfig, load_config


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(name: str, *more: str) -> tuple[FinetuneConfig, str]:
    assert goal.main(["--goal", name, "--yes", *more]) == 0
    return load_config(["recipe.yaml"]), Path("recipe.yaml").read_text()


def at_terminal(monkeypatch: pytest.MonkeyPatch, name: str, replies: list[str]) -> list[str]:
    """Run `fastgpt init` at a terminal; return the questions."""
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked: list[str] = []

    def ask(question: str) -> str:
        asked.append(question)
        return replies[len(asked) - 1]

    assert goal.main(["--goal", name], ask) == 0
    return asked


@pytest.mark.parametrize("name", goal.GOALS)
def test_every_recipe_is_valid_and_its_rows_have_the_format_of_its_task(name: str) -> None:
    config, text = written(name)
    assert config.task == goal.GOALS[name].task and config.out == f"runs/{name}" and config.data == f"data/{name}.jsonl"
    rows = [json.loads(line[2:]) for line in text.splitlines() if line.startswith("# {")]
    assert len(rows) == 2
    known = formats.LABELS if name == "classify" else formats.EXAMPLES
    for row in rows:
        found = Row(row, True, cast(Any, None), 0)
        assert known[formats.detect(found, known, {})][1](formats.Reader(), found)
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("# {"))
    assert "Metric: " in text and "fastgpt finetune recipe.yaml" in text


def test_it_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    written("classify")
    said = capsys.readouterr().out
    assert "missing: data/classify.jsonl, 200 rows or more with text and label" in said
    assert "missing: runs/tiny, the model to start from" in said
    Path("data").mkdir()
    Path("data/classify.jsonl").write_text('{"text": "a", "label": "b"}\n\n' * 3)
    Path("runs/mine/step_00000001").mkdir(parents=True)
    Path("recipe.yaml").unlink()
    config, text = written("classify")
    said = capsys.readouterr().out
    assert "data/classify.jsonl has 3 rows, expected 200 or more" in said and "to start from" not in said
    assert config.base == "runs/mine" and "fastgpt train" not in text
    Path("data/classify.jsonl").write_text('{"text": "a", "label": "b"}\n' * 200)
    Path("recipe.yaml").unlink()
    written("classify")
    assert "nothing is missing" in capsys.readouterr().out


def test_replies_at_a_terminal_go_into_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = at_terminal(monkeypatch, "classify", ["my rows.jsonl", "runs/other", "gpt2-124m", "lora", "no, yes"])
    assert len(asked) == 5
    config, text = load_config(["recipe.yaml"]), Path("recipe.yaml").read_text()
    assert config.data == "my rows.jsonl" and config.base == "runs/other" and config.lora.rank == 16
    assert config.lr is None  # the default of the task
    assert config.labels == ["no", "yes"] and "fastgpt train --config gpt2-124m --out runs/other" in text


def test_empty_replies_are_the_defaults_and_no_goal_asks_more_than_five(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in goal.GOALS:
        assert len(at_terminal(monkeypatch, name, [""] * 5)) <= 5
        asked = Path("recipe.yaml").read_text()
        Path("recipe.yaml").unlink()
        assert written(name)[1] == asked
        Path("recipe.yaml").unlink()


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        (["", "", "huge"], "size is 'huge', expected one of tiny, "),
        (["", "", "", "half"], "method is 'half', expected all or lora"),
        (["", "", "", "", "few"], "epochs is 'few', expected a number more than 0"),
    ],
)
def test_replies_that_make_no_sense(replies: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        at_terminal(monkeypatch, "qa", replies)
    assert not list(Path().iterdir())


def test_a_recipe_is_not_overwritten() -> None:
    Path("recipe.yaml").write_text("mine")
    with pytest.raises(UserError, match="recipe.yaml exists, expected a new file"):
        goal.main(["--goal", "chat", "--yes"])
    assert Path("recipe.yaml").read_text() == "mine"
    with pytest.raises(UserError, match="invalid choice: 'poems'"):
        goal.main(["--goal", "poems"])
