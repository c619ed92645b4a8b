"""An exported suite has the same figures in the LM Evaluation Harness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from suite_files import items_of, run_part, texts_of, tiny_target, write_rows, write_suite

from fastgpt.core.errors import UserError
from fastgpt.evaluate import suite_export
from fastgpt.evaluate.engine import Engine
from fastgpt.evaluate.suite import suite_of
from fastgpt.evaluate.suite_file import open_suite

pytest.importorskip("lm_eval")
SETTINGS: dict[str, dict[str, Any]] = {
    "choice": dict(prompt="Q: {question}\nA:", description="Animals.\n\n", shots=2),
    "classification": dict(shots=3),
    "cloze": dict(shots=1),
    "qa": dict(max_new_tokens=6, shots=1),
    "span": dict(max_new_tokens=6, stop=["\n", " the"], normalize=False),
    "perplexity": {},
    "generation": dict(max_new_tokens=8, judge={"regex": "cat"}),
}


def harness(path: Path, task: str) -> dict[str, Any]:
    """Return the figures that lm_eval has for a task of a folder."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from fastgpt.evaluate.adapter import HarnessModel

    manager = TaskManager(include_path=str(path), include_defaults=False)
    model = HarnessModel(Engine(tiny_target()))
    found = simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=0, verbosity="ERROR")
    return {name.removesuffix(",none"): v for name, v in found["results"][task].items()}


@pytest.mark.parametrize("kind", SETTINGS)
def test_figures_are_those_of_the_harness(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    settings = SETTINGS[kind]
    if settings.get("shots"):
        write_rows(tmp_path / "pool.jsonl", items_of(kind, 4, first=40))
        settings = settings | {"examples": "pool.jsonl"}
    path = write_suite(tmp_path, kind, **settings)
    if kind in ("qa", "span"):  # let the model be right about every other item
        rows = [row | {"answer": text.strip() or "x"} for row, text in zip(items_of(kind, 12), texts_of(path))]
        for row in rows[::2]:
            row.pop("answers", None)
        write_suite(tmp_path, kind, [*rows[::2], *items_of(kind, 12)[1::2]], **settings)
    ours = run_part(suite_of(path))
    assert suite_export.main([str(path), str(tmp_path / "task")]) == 0
    theirs = harness(tmp_path / "task", f"my-{kind}")
    assert len(ours.figures) == len(suite_export.FIGURES.get(kind, "1")) and theirs["sample_len"] == 12
    for figure in ours.figures:
        assert theirs[figure.metric] == pytest.approx(figure.value, rel=1e-9, abs=1e-12), figure.metric
    if kind in ("qa", "span", "generation"):
        assert any(0 < figure.value < 1 for figure in ours.figures)


def test_a_chat_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the harness takes --apply_chat_template"):
        suite_export.export_suite(open_suite(write_suite(tmp_path, "qa", chat=True)), tmp_path / "task")


def test_a_schema_is_exported_and_a_model_as_judge_is_not(tmp_path: Path) -> None:
    path = write_suite(tmp_path, "generation", [{"prompt": "a"}], judge={"schema": {"type": "object"}})
    assert suite_export.export_suite(open_suite(path), tmp_path / "task").is_file()
    doc = {"answers": [], "regex": ""}
    assert suite_export.figures_of(str(path), doc, ['{"a": 1}']) == {"valid": 1}
    assert suite_export.figures_of(str(path), doc, ["[1]"]) == {"valid": 0}
    judge = {"model": {"url": "http://localhost:1/v1", "model": "m"}}
    path = write_suite(tmp_path, "generation", [{"prompt": "a"}], judge=judge)
    with pytest.raises(UserError, match="judged by a model"):
        suite_export.export_suite(open_suite(path), tmp_path / "task")
