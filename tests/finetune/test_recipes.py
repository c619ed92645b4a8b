"""The recipes in recipes/finetune: their settings, the rows that their script writes, and two steps of each."""

from __future__ import annotations

import ast
import json
import math
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastgpt import train
from fastgpt.finetune.command import main
from fastgpt.finetune.config import load_config

ROOT = Path(__file__).parents[2]
RECIPES = sorted(p for p in (ROOT / "recipes" / "finetune").glob("*.yaml") if p.stem != "constitution")
# recipes that continue from another recipe's run
AGAIN = {
    "grpo": ["--base", "runs/tiny"],
    "distil": ["--teacher", "runs/tiny"],
    "constitutional": ["--base", "runs/tiny"],
}
BASE = (
    "--vocab-size 800 --model.n-layers 1 --model.n-heads 2 --model.width 16 --block-size 256 --micro-batch 1 "
    "--batch-tokens 256 --max-steps 2 --max-minutes null --eval-every 0 --save-every 0 --sample-tokens 1 --device cpu"
).split()
FAST = "--block-size 256 --batch 8 --micro-batch 8 --max-steps 2 --eval-every 2 --eval-batches 1 --device cpu".split()
ROWS = 48  # of each file
PAIRS = "".join(  # as make-pairs writes them
    json.dumps(
        {
            "prompt": [{"role": "user", "content": f"What is {i}?"}],
            "chosen": [{"role": "assistant", "content": f"The number {i}."}],
            "rejected": [{"role": "assistant", "content": "A letter."}],
            "rule": "helpful",
        }
    )
    + "\n"
    for i in range(ROWS)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the recipes, some of their rows, and a base."""
    folder = tmp_path_factory.mktemp("recipes")
    shutil.copytree(ROOT / "recipes" / "finetune", folder / "recipes" / "finetune")
    rows = runpy.run_path(str(ROOT / "recipes" / "finetune" / "rows.py"))
    rows["main"](folder / "data" / "rows")
    for path in folder.glob("data/rows/*/*.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:: max(1, len(lines) // ROWS)]))
    (folder / "data" / "constitution").mkdir()
    (folder / "data" / "constitution" / "pairs.jsonl").write_text(PAIRS)
    (folder / "text.txt").write_text((folder / "data" / "rows" / "train" / "completion.jsonl").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main([*BASE, "--data", "text.txt", "--out", "runs/tiny"]) == 0
    return folder


def test_there_is_a_recipe_for_each_task_that_the_page_names() -> None:
    page = (ROOT / "docs" / "finetune.md").read_text().partition("## Recipes")[2]
    assert re.findall(r"^\| `(\w+)`", page, re.M) == sorted(path.stem for path in RECIPES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_settings_of_a_recipe_are_read_and_name_its_files(path: Path) -> None:
    config = load_config([str(path)])
    assert config.out == f"runs/{path.stem}"
    runs = {Path(run).name for run in (config.base, config.teacher) if run}
    assert runs <= {"tiny", *(recipe.stem for recipe in RECIPES)}
    for reward in config.reward:
        assert callable(runpy.run_path(str(ROOT / reward.partition(":")[0]))[reward.partition(":")[2]])


def test_number_words_and_json_of_imports() -> None:
    rows: dict[str, Any] = runpy.run_path(str(ROOT / "recipes" / "finetune" / "rows.py"))
    written = {row["completion"].strip(): row["prompt"] for _, row in rows["numbers"]()}
    assert len(written) == 1000 and "seven hundred and forty-one\n" in written["741"]
    text = "import os, sys\nfrom . import a\n"
    module = rows["Module"]("m", text, ast.parse(text))
    records = [json.loads(row["completion"])["imports"] for _, row in rows["extract"]([module])]
    assert records == [["os", "sys"], ["os", "sys", "."], ["."]]


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in RECIPES])
def test_a_recipe_runs(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(folder)
    more = AGAIN.get(name, [])
    assert main([f"recipes/finetune/{name}.yaml", *FAST, *more, "--out", str(tmp_path / "run")]) == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if "loss" in row] == [1, 2]
    assert all(math.isfinite(row["val_loss"]) for row in log if "val_loss" in row)
    assert any("val_loss" in row for row in log)


def test_scores_are_those_counted_by_hand() -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    scores = runpy.run_path(str(ROOT / "recipes" / "finetune" / "score.py"))["scores"]
    text, expected = "Sat the cat!", "the big cat sat down"
    found = scores([text, "no"], [expected, "no"])
    assert found["exact match"] == 50
    assert found["F1"] == pytest.approx(
        100 * (2 * 1 / 8 + 1) / 2
    )  # case and punctuation are kept: only "the" is common
    rouge = 2 * (2 / 3) * 0.4 / (2 / 3 + 0.4)
    assert found["ROUGE-L"] == pytest.approx(100 * (rouge + 1) / 2)
    # 'ab' and 'abc': precision 1 for both orders that both have, recall 2/3 and 1/2
    recall = (2 / 3 + 1 / 2) / 2
    assert scores(["a b"], ["abc"])["chrF"] == pytest.approx(100 * 5 * recall / (4 + recall))


@pytest.mark.slow
def test_a_run_is_scored(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    monkeypatch.chdir(folder)
    score = runpy.run_path(str(ROOT / "recipes" / "finetune" / "score.py"))
    found = score["main"](["runs/tiny", "data/rows/val/numbers.jsonl", "--limit", "5", "--max-new-tokens", "4"])
    assert set(found) == {"exact match", "F1", "ROUGE-L", "chrF"} and all(0 <= v <= 100 for v in found.values())
    assert "5 of 5 rows" in capsys.readouterr().out
