"""Presets against the harness as it is: its own model over the exported run, and YAMLs that name the official files."""

from __future__ import annotations

import csv
import dataclasses
import json
import socket
from pathlib import Path
from typing import Any

import benchmark_files
import pytest
import yaml
from benchmark_files import SUBJECTS, jsonl, write_all
from small_target import small_target

from fastgpt.convert import exporting
from fastgpt.evaluate.engine import Engine
from fastgpt.evaluate.presets import ORDER, HarnessTasks
from fastgpt.evaluate.results import Results
from fastgpt.evaluate.run import evaluate
from fastgpt.evaluate.target import Target, open_target
from fastgpt.evaluate.task_files import benchmarks, read
from fastgpt.training import checkpoint
from fastgpt.training.config import TrainConfig, to_dict

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
    winogrande = {"validation": folder / "winogrande.jsonl", "train": data / "winogrande_1.1/train_xl.jsonl"}
    rows = read(benchmarks()["winogrande"], [data / "winogrande_1.1/dev.jsonl"])[""]
    jsonl(winogrande["validation"], rows)
    plain_task(folder, "plain_winogrande", "winogrande/default.yaml", winogrande, 5)
    lambada = {"test": data / "lambada_test.jsonl"}
    plain_task(folder, "plain_lambada", "lambada/lambada_openai.yaml", lambada, 0)
    for subject, name in zip(SUBJECTS, MMLU, strict=True):
        files = {split: folder / f"{subject}-{split}.jsonl" for split in ("test", "dev")}
        for split, path in files.items():
            cells = csv.reader((data / "mmlu/data" / split / f"{subject}_{split}.csv").open(encoding="utf-8"))
            jsonl(path, [{"question": c[0], "choices": c[1:5], "answer": "ABCD".index(c[5])} for c in cells])
        plain_task(folder, f"plain_{name}", f"mmlu/default/{name}.yaml", files, 5)
    return ["plain_hellaswag", "plain_winogrande", "plain_lambada", *(f"plain_{name}" for name in MMLU)]


def saved(folder: Path, config: dict[str, Any]) -> Target:
    """Save a small model as a run with these settings; return its target."""
    small = small_target(folder)
    state = {"progress": {"tokens": 64}, "model": dataclasses.asdict(small.model.config), "config": config}
    state |= {"tokenizer": small.tokenizer.fingerprint, "loader": {}}
    checkpoint.save(folder / "run", 1, small.model.state_dict(), {}, state, keep=0)
    small.tokenizer.save(folder / "run" / "tokenizer.json")
    return open_target(str(folder / "run"), device="cpu")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Any]:
    """Return our results, and those of the harness."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("harness")
    data = write_all(folder / "data", n=8)
    target = saved(folder, {})
    assert exporting.main([str(folder / "run"), "--out", str(folder / "hf")]) == 0
    listed = folder / "tasks.yaml"
    listed.write_text(json.dumps(["hellaswag", "winogrande", "lambada_openai", "mmlu"]), encoding="utf-8")
    ours = evaluate(target, str(listed), data=data, progress=False)
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
    assert compared == 2 + 1 + 2 + len(MMLU)


@pytest.mark.slow
def test_prompts_are_those_of_the_harness(both: tuple[Results, Any], tmp_path: Path) -> None:
    """The same examples in the same order, which few questions of a small model would not show in the figures."""
    target, data = small_target(tmp_path), write_all(tmp_path / "data", n=8)
    for name in ("hellaswag", "winogrande", "lambada_openai", "mmlu"):
        part = HarnessTasks(benchmarks()[name], data)
        part.check(target)
        part.run(Engine(target), Results({}, name), None)
        for task, made in part._tasks.items():
            other = task.replace("fastgpt_", "plain_").replace("lambada_openai", "lambada")
            theirs = [tuple(pair) for sample in both[1]["samples"][other] for pair in sample["arguments"]]
            assert [request.args for request in made.instances] == theirs, task


@pytest.mark.slow
def test_choices_are_far_enough_apart_to_compare(both: tuple[Results, Any]) -> None:
    for name, samples in both[1]["samples"].items():
        for sample in samples:
            answers = [float(answer[0]) for answer in sample["filtered_resps"]]
            lengths = [len(arguments[1].strip()) for arguments in sample["arguments"]]
            for scores in (answers, [a / n for a, n in zip(answers, lengths, strict=True)]):
                best = sorted(scores)[-2:]
                assert len(best) == 1 or best[1] - best[0] > 1e-4, name


@pytest.mark.slow
def test_full_runs_offline_with_every_subject_and_paradigm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval

    tasks = Path(str(lm_eval.__file__)).parent / "tasks"
    subjects = [path.stem.removeprefix("mmlu_") for path in sorted((tasks / "mmlu/default").glob("mmlu_*.yaml"))]
    monkeypatch.setattr(benchmark_files, "SUBJECTS", subjects)
    monkeypatch.setattr(benchmark_files, "PARADIGMS", [path.stem for path in (tasks / "blimp").glob("[a-z]*.yaml")])
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was opened"))
    monkeypatch.chdir(tmp_path)
    data = write_all(tmp_path / "data", n=2)
    Path("text.txt").write_text(" ".join(benchmark_files.WORDS * 200), encoding="utf-8")
    config = to_dict(TrainConfig(data="text.txt", tokenizer=str(tmp_path / "run")))
    results = evaluate(saved(tmp_path, config), "full", data=data, limit=1, progress=False)
    assert [f.task for f in results.figures if "/" not in f.task and f.metric in ("acc", "perplexity")] == [
        "validation",
        "lambada_openai",
        *(name for name in ORDER),
    ]
    counts = {f.task: f.n for f in results.figures}
    assert (counts["mmlu"], counts["blimp"]) == (57, 67)
    categories = {f.task.split("/")[1]: f.n for f in results.figures if f.task.count("/") == 1 and "mmlu" in f.task}
    assert categories == {"stem": 19, "humanities": 13, "social_sciences": 12, "other": 13}
