"""The recipes for GPUs: their pages say what their plans print, and their dry runs run every command."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from fastgpt.cli import COMMANDS

RECIPES = Path(__file__).parent.parent / "recipes"
script: dict[str, Any] = runpy.run_path(str(RECIPES / "dry_run.py"))
NAMES = script["RECIPES"]


def page_of(name: str) -> str:
    return (RECIPES / name / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_plans_print_the_hours_and_the_cost_of_the_page(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(RECIPES.parent)
    plans = [words for words in script["commands"](page_of(name)) if "--plan" in words]
    assert len(plans) > 1
    rows = [line for line in page_of(name).splitlines() if line.startswith("| ")]
    for words in plans:
        assert COMMANDS[words[1]](words[2:]) == 0
        said = capsys.readouterr().out
        assert re.search(r"^fits: ", said, re.M)
        found = re.search(r": ([\d.]+) hours \([\d.]+ GPU-hours(?:, cost ([\d,.]+))?", said)
        assert found is not None
        card = words[words.index("--device") + 1].upper()
        row = next(
            row for row in rows if card in row and (not found[2] or f"| {words[words.index('--gpus') + 1]} " in row)
        )
        assert found[1] in row, (words, row)
        assert not found[2] or f"{float(found[2].replace(',', '')):,.0f} |" in row, (words, row)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_names_every_file_and_the_readers_of_the_data_know_the_recipe(name: str) -> None:
    from fastgpt.data.recipe_file import load_recipe
    from fastgpt.training.config import load_config

    for path in (RECIPES / name).glob("*.yaml"):
        assert f"`{path.name}`" in page_of(name) or f"{name}/{path.name}" in page_of(name)
        if "\nsources:" in path.read_text():
            assert load_recipe(str(path)).mix.tokens
    steps = load_config(["--config", str(RECIPES / name / "train.yaml")])
    tokens = steps.most_steps * steps.batch_tokens
    planned = float(re.findall(r"--tokens (\S+)", page_of(name))[0])
    assert tokens == pytest.approx(planned, rel=0.01), "the page plans the tokens that the settings train on"


def test_a_dry_run_ends_with_the_first_command_that_fails(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(script["main"].__globals__, "stand_ins", lambda: None)
    (tmp_path / "mine").mkdir()
    lines = ("train --plan --config tiny", "train --plan --config absent.yaml", "doctor")
    (tmp_path / "mine" / "README.md").write_text("```bash\n" + "".join(f"fastgpt {line}\n" for line in lines) + "```\n")
    assert script["main"]([str(tmp_path / "mine")]) == 2
    said, wrong = capfd.readouterr()
    assert "$ fastgpt train --plan --config absent.yaml" in said and "doctor" not in said
    assert "error: config is 'absent.yaml', expected a YAML file" in wrong and "mine: exit code 2" in wrong


@pytest.mark.slow
def test_the_dry_runs(capfd: pytest.CaptureFixture[str]) -> None:
    assert script["main"]([]) == 0, capfd.readouterr().err[-3000:]
    said = capfd.readouterr().out
    for name in ("data/base", "data/domain", "runs/350m", "runs/350m-domain", "runs/speedrun"):
        assert name in said
    for task in ("lambada_openai", "hellaswag", "winogrande", "arc_easy", "piqa", "blimp", "openbookqa", "boolq"):
        assert said.count(f"\n{task} ") > 1, "of both models"
