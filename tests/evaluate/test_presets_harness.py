"""Presets against the harness as it is: its own model over the exported run, and YAMLs that name the official files."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmark_files import SUBJECTS, jsonl, write_all
from small_target import small_target

from fastgpt.convert import exporting
from fastgpt.evaluate.results import Results
from fastgpt.evaluate.run import evaluate
from fastgpt.evaluate.target import open_target
from fastgpt.training import checkpoint

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")
MMLU = [f"mmlu_{subject}" for subject in SUBJECTS]


def plain_task(folder: Path, name: str, include: str, files: dict[str, Path], shots: int) -> None:
    """Write the YAML of a task of the harness over local files."""
    import lm_eval

    config = {
        "include": str(Path(str(lm_eval.__file__)).parent / "tasks" / include),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}},
        "num_fewshot": shots,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def plain_tasks(folder: Path, data: Path) -> list[str]:
    folder.mkdir()
    hellaswag = {"validation": data / "hellaswag_val.jsonl", "train": data / "hellaswag_train.jsonl"}
    plain_task(folder, "plain_hellaswag", "hellaswag/hellaswag.yaml", hellaswag, 10)
    lambada = {"test": data / "lambada_test.jsonl"}
    plain_task(folder, "plain_lambada", "lambada/lambada_openai.yaml", lambada, 0)
    for subject, name in zip(SUBJECTS, MMLU, strict=True):
        files = {split: folder / f"{subject}-{split}.jsonl" for split in ("test", "dev")}
        for split, path in files.items():
            cells = csv.reader((data / "mmlu/data" / split / f"{subject}_{split}.csv").open(encoding="utf-8"))
            jsonl(path, [{"question": c[0], "choices": c[1:5], "answer": "ABCD".index(c[5])} for c in cells])
        plain_task(folder, f"plain_{name}", f"mmlu/default/{name}.yaml", files, 5)
    return ["plain_hellaswag", "plain_lambada", *(f"plain_{name}" for name in MMLU)]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Any]:
    """Return our results, and those of the harness."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("harness")
    data = write_all(folder / "data", n=8)
    small = small_target(folder)
    state = {"progress": {"tokens": 64}, "model": dataclasses.asdict(small.model.config), "config": {}, "loader": {}}
    state["tokenizer"] = small.tokenizer.fingerprint
    checkpoint.save(folder / "run", 1, small.model.state_dict(), {}, state, keep=0)
    small.tokenizer.save(folder / "run" / "tokenizer.json")
    assert exporting.main([str(folder / "run"), "--out", str(folder / "hf")]) == 0
    listed = folder / "tasks.yaml"
    listed.write_text(json.dumps(["hellaswag", "lambada_openai", "mmlu"]), encoding="utf-8")
    ours = evaluate(open_target(str(folder / "run"), device="cpu"), str(listed), data=data, progress=False)
    names = plain_tasks(folder / "plain", data)
    theirs = simple_evaluate(
        HFLM(str(folder / "hf"), device="cpu", dtype="float32", batch_size=4),
        tasks=names,
        task_manager=TaskManager(include_path=str(folder / "plain"), include_defaults=False),
        bootstrap_iters=100,
    )
    return ours, theirs


@pytest.mark.slow
def test_figures_are_those_of_the_harness(both: tuple[Results, Any]) -> None:
    ours, theirs = both
    compared = 0
    for name, result in theirs["results"].items():
        for metric in ("acc", "acc_norm", "perplexity"):
            if f"{metric},none" not in result:
                continue
            task = name.removeprefix("plain_").replace("lambada", "lambada_openai")
            labels = [f.task for f in ours.figures if f.task == task or task == f"mmlu_{f.task.split('/')[-1]}"]
            figure = ours.figure(labels[-1], metric)
            assert figure is not None
            assert figure.value == pytest.approx(result[f"{metric},none"], rel=1e-4), (name, metric)
            if metric != "perplexity":  # theirs is a bootstrap
                assert figure.stderr == pytest.approx(result[f"{metric}_stderr,none"], rel=1e-6), (name, metric)
            compared += 1
    assert compared == 2 + 2 + len(MMLU)


@pytest.mark.slow
def test_choices_are_far_enough_apart_to_compare(both: tuple[Results, Any]) -> None:
    for name, samples in both[1]["samples"].items():
        for sample in samples:
            answers = [float(answer[0]) for answer in sample["filtered_resps"]]
            lengths = [len(arguments[1].strip()) for arguments in sample["arguments"]]
            for scores in (answers, [a / n for a, n in zip(answers, lengths, strict=True)]):
                best = sorted(scores)[-2:]
                assert len(best) == 1 or best[1] - best[0] > 1e-4, name
