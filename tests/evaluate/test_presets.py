"""Presets run offline on small files in the official schemas, and refuse wrong files before anything is computed."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmark_files import parquet, write_all
from small_target import small_target

from fastgpt.core.errors import UserError
from fastgpt.evaluate.presets import ORDER, HarnessTasks, parts_of
from fastgpt.evaluate.results import Results
from fastgpt.evaluate.run import evaluate
from fastgpt.evaluate.target import Target
from fastgpt.evaluate.task_files import benchmarks, find, read

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return small_target(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def base(data: Path, target: Target) -> Results:
    """Return the results of the preset base, with every connection refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was opened"))
        return evaluate(target, "base", data=data, progress=False)


@pytest.mark.parametrize("name", ORDER)
def test_official_files_and_hub_exports_are_the_same_rows(name: str, data: Path, tmp_path: Path) -> None:
    hub = write_all(tmp_path, hub=True)
    benchmark = benchmarks()[name]
    for split in benchmark.needs(benchmark.shots):
        official = read(benchmark, find(data, benchmark, split))
        assert official == read(benchmark, find(hub, benchmark, split))
        assert sum(map(len, official.values())) >= 5


def test_base_has_every_benchmark(base: Results) -> None:
    tasks = [f.task for f in base.figures if "/" not in f.task]
    assert list(dict.fromkeys(tasks)) == [name for name in ORDER if name != "arc_challenge"]
    shots = {f.task: f.shots for f in base.figures}
    assert (shots["hellaswag"], shots["winogrande"], shots["mmlu"], shots["piqa"]) == (10, 5, 5, 0)
    json.dumps([f.value for f in base.figures], allow_nan=False)


def test_base_says_what_is_missing(base: Results, target: Target, data: Path, tmp_path: Path) -> None:
    assert any("validation data is not scored" in note for note in base.notes)
    assert "mmlu: 3 of its 57 parts have files" in base.notes
    folder = tmp_path / "some"
    shutil.copytree(data / "boolq", folder / "boolq")
    found = evaluate(target, "base", data=folder, progress=False)
    assert {f.task for f in found.figures} == {"boolq"}
    note = next(note for note in found.notes if note.startswith("left out for lack of files"))
    assert all(name in note for name in ORDER if name not in ("boolq", "arc_challenge")) and "boolq" not in note
    assert f"piqa (valid.jsonl, or validation-*.parquet, in {folder}/piqa)" in note


def test_mmlu_is_the_mean_over_questions(base: Results) -> None:
    whole, parts = base.figure("mmlu", "acc"), [f for f in base.figures if f.task.count("/") == 2]
    parts = [f for f in parts if f.task.startswith("mmlu/")]
    assert whole is not None and [f.task for f in parts] == [
        "mmlu/stem/abstract_algebra",
        "mmlu/stem/anatomy",
        "mmlu/humanities/world_religions",
    ]
    assert [f.n for f in parts] == [6, 7, 8] and whole.n == 21
    assert whole.value == pytest.approx(sum(f.value * f.n for f in parts) / 21)
    stem = base.figure("mmlu/stem", "acc")
    assert stem is not None and stem.n == 13


def test_chance_is_of_the_choices_and_items_belong_to_figures(base: Results) -> None:
    chances = {f.task: f.chance for f in base.figures}
    assert chances["hellaswag"] == 0.25 and chances["piqa"] == 0.5 and chances["lambada_openai"] is None
    assert chances["arc_easy"] == pytest.approx((2 / 3 + 4 / 4) / 6)  # two of the six questions have 3 choices
    for items in base.items:
        figure = base.figure(items.task, items.metric)
        assert figure is not None and len(items.ids) == len(items.values) == figure.n
        assert figure.value == pytest.approx(sum(items.values) / figure.n)


def test_truncated_prompts_are_counted(data: Path, tmp_path: Path) -> None:
    short = small_target(tmp_path, block_size=180)
    part = HarnessTasks(benchmarks()["hellaswag"], data)
    part.check(short)
    longest = max(len(short.tokenizer.encode(text)) for text in _prompts(part))
    results = evaluate(small_target(tmp_path, block_size=longest - 10), _list(tmp_path, "hellaswag"), data=data)
    assert results.truncated["hellaswag"] > 0


def _prompts(part: HarnessTasks) -> list[str]:
    task = part._tasks["fastgpt_hellaswag"]
    return [task.fewshot_context(doc, part.shots) for doc in task.eval_docs]


def _list(folder: Path, *entries: Any) -> str:
    path = folder / "tasks.yaml"
    path.write_text(yaml.safe_dump(list(entries)), encoding="utf-8")
    return str(path)


def test_full_wants_every_file_and_every_part(data: Path, target: Target, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected --data DIR"):
        parts_of("full", None)
    whole = [part for part in parts_of("full", data) if part.name == "mmlu"]
    with pytest.raises(UserError, match=r"mmlu has 3 parts below .*, expected 57"):
        whole[0].check(target)
    some = tmp_path / "some"
    shutil.copytree(data, some)
    shutil.rmtree(some / "piqa")
    with pytest.raises(UserError, match=r"piqa has no validation files, expected valid.jsonl, or .* in .*/piqa"):
        parts_of("full", some)


def test_full_runs_all_that_is_there(data: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of("full", data)
    assert [part.name for part in parts] == ["perplexity", *ORDER]
    with pytest.raises(UserError, match="small is not a run of `fastgpt train`"):
        parts[0].check(target)


def test_a_list_of_tasks(data: Path, target: Target, tmp_path: Path) -> None:
    preset = _list(tmp_path, "arc_challenge", {"task": "hellaswag", "shots": 2})
    results = evaluate(target, preset, data=data, limit=3, progress=False)
    assert {(f.task, f.n, f.shots) for f in results.figures} == {("arc_challenge", 3, 0), ("hellaswag", 3, 2)}
    assert "the first 3 items of each task only (--limit 3)" in results.notes


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "is an empty list, expected benchmarks, perplexity or suites"),
        (["glue"], "entry 1: task is 'glue', expected perplexity, lambada_openai, "),
        ([{"task": "piqa", "shot": 1}], "entry 1 has shot, expected task and shots"),
        ([{"task": "piqa", "shots": -1}], "entry 1: shots is -1, expected a whole number, 0 or more"),
        ([{"task": "perplexity", "shots": 1}], "entry 1: perplexity takes no shots, only a benchmark does"),
    ],
)
def test_wrong_lists_are_refused(entries: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        parts_of(_list(tmp_path, *entries), tmp_path)


def test_wrong_presets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="preset is 'bass', expected base, full, safety or a file"):
        parts_of("bass", tmp_path)
    with pytest.raises(UserError, match="is not a folder, expected one with the files of the benchmarks"):
        parts_of("base", tmp_path / "absent")
    with pytest.raises(UserError, match="entry 1: shots is 2, but blimp has no examples, expected 0"):
        parts_of(_list(tmp_path, {"task": "blimp", "shots": 2}), tmp_path)
    with pytest.raises(UserError, match="entry 1: piqa needs its files, expected --data DIR"):
        parts_of(_list(tmp_path, "piqa"), None)


def _edit(path: Path, line: int, **changes: Any) -> None:
    """Change the values of a row; None removes a key."""
    rows = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    rows[line - 1] = {k: v for k, v in {**rows[line - 1], **changes}.items() if v is not None}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize(
    ("task", "file", "changes", "message"),
    [
        ("hellaswag", "hellaswag_val.jsonl", {"ctx_a": None}, r"hellaswag_val.jsonl:2 has no key 'ctx_a'"),
        ("hellaswag", "hellaswag_val.jsonl", {"label": 4}, r":2: label is 4, expected one of 0, 1, 2, 3$"),
        ("hellaswag", "hellaswag_val.jsonl", {"endings": ["a"]}, r":2: endings is \['a'\], expected at least 2 texts"),
        ("hellaswag", "hellaswag_train.jsonl", {"label": ""}, r"hellaswag_train.jsonl:2: label is '', expected one of"),
        ("lambada_openai", "lambada_test.jsonl", {"text": "one"}, r":2: text is 'one', expected at least 2 words"),
        ("piqa", "piqa/valid.jsonl", {"goal": "a \ud800"}, r":2: goal is .*ud800', expected text that UTF-8 can hold"),
        ("lambada_openai", "lambada_test.jsonl", {"text": 3}, r":2: text is 3, expected text"),
        ("boolq", "boolq/dev.jsonl", {"answer": "maybe"}, r":2: answer is 'maybe', expected one of 0, 1, False, True"),
        ("winogrande", "winogrande_1.1/train_xl.jsonl", {"sentence": "no gap"}, r":2: sentence is 'no gap', expected"),
        ("winogrande", "winogrande_1.1/train_xl.jsonl", {"answer": "3"}, r":2: answer is '3', expected one of 1, 2"),
        (
            "arc_easy",
            "ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Test.jsonl",
            {"answerKey": "E"},
            r":2: answerKey is 'E', expected one of 1, 2, 3",
        ),
        (
            "arc_easy",
            "ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Test.jsonl",
            {"question": {}},
            r":2, question has no key 'stem'",
        ),
    ],
)
def test_wrong_rows_are_refused(
    task: str, file: str, changes: dict[str, Any], message: str, data: Path, target: Target, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    _edit(folder / file, 2, **changes)
    with pytest.raises(UserError, match=message):
        HarnessTasks(benchmarks()[task], folder).check(target)


def test_wrong_files_are_refused(data: Path, target: Target, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)

    def check(name: str, **options: Any) -> None:
        HarnessTasks(benchmarks()[name], folder, **options).check(target)

    with pytest.raises(UserError, match="hellaswag has 14 examples in train below .*, expected at least 15"):
        check("hellaswag", shots=14)
    (folder / "mmlu/data/dev/anatomy_dev.csv").unlink()
    with pytest.raises(UserError, match="mmlu/anatomy has 0 examples in dev below .*, expected at least 5"):
        check("mmlu")
    (folder / "mmlu/data/dev/anatomy_dev.csv").write_text("a,b,c\n")
    with pytest.raises(UserError, match="anatomy_dev.csv:1 has 3 columns, expected 6"):
        check("mmlu")
    (folder / "piqa/valid-labels.lst").write_text("0\n")
    with pytest.raises(UserError, match="the labels of .*/piqa/valid.jsonl are 1, expected 6"):
        check("piqa")
    (folder / "piqa/valid-labels.lst").unlink()
    with pytest.raises(UserError, match=r"valid.jsonl:1 has no key 'label', and there is no file of labels"):
        check("piqa")
    (folder / "lambada_test.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match=r"lambada_test.jsonl:1 is '\[1\]', expected a JSON object"):
        check("lambada_openai")
    (folder / "lambada_test.jsonl").write_text("\n")
    with pytest.raises(UserError, match="lambada_test.jsonl has no rows"):
        check("lambada_openai")
    parquet(folder / "blimp" / "b.parquet", [])
    (folder / "boolq/dev.jsonl").rename(folder / "boolq/validation-0.parquet")
    with pytest.raises(UserError, match="validation-0.parquet is not a parquet file"):
        check("boolq")


def test_an_unknown_subject_is_refused(target: Target, tmp_path: Path) -> None:
    rows = [{"question": "a", "choices": list("wxyz"), "answer": 1, "subject": "cooking"}] * 5
    for split in ("test", "dev"):
        parquet(tmp_path / "mmlu" / "all" / f"{split}-0.parquet", rows)
    with pytest.raises(UserError, match="mmlu has a part 'cooking' below .*, which the harness does not know"):
        HarnessTasks(benchmarks()["mmlu"], tmp_path).check(target)


def test_a_context_shorter_than_a_question_is_refused(data: Path, tmp_path: Path) -> None:
    short = small_target(tmp_path, block_size=8)
    message = r"hellaswag has \d+ tokens in its shortest question, expected at most 8, the context of small"
    with pytest.raises(UserError, match=message):
        HarnessTasks(benchmarks()["hellaswag"], data).check(short)
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    _edit(folder / "piqa/valid.jsonl", 2, sol1="the " * 70)
    with pytest.raises(UserError, match=r"piqa has \d+ tokens in its longest choice, expected at most 64"):
        HarnessTasks(benchmarks()["piqa"], folder).check(small_target(tmp_path, block_size=64))


def test_a_context_shorter_than_every_prompt_is_said(data: Path, tmp_path: Path) -> None:
    results = evaluate(small_target(tmp_path, block_size=96), _list(tmp_path, "hellaswag"), data=data, progress=False)
    assert "hellaswag: no prompt with 10 examples fits into the context of 96 tokens" in results.notes[0]
    assert results.truncated["hellaswag"] == 6


def test_both_lengths_are_shown_where_another_choice_wins(data: Path, target: Target, tmp_path: Path) -> None:
    part = HarnessTasks(benchmarks()["piqa"], data)

    def samples(choice: str) -> dict[str, list[dict[str, Any]]]:
        arguments = [("q", f" {choice}"), ("q", " tea")]
        answers = [(-6.5, False), (-5.0, False)]  # per character 1.08 and 1.67, per byte 0.54 or 1.08 and 1.67
        sample = {"doc": {"q": choice}, "arguments": arguments, "filtered_resps": answers, "resps": answers}
        return {"": [{**sample, "acc": 0.0, "acc_norm": 1.0, "acc_bytes": 1.0}]}

    results = Results({}, "base")
    part._add("acc_bytes", samples("coffee"), results)
    assert not results.figures  # one byte for each character: acc_norm says it all
    part._add("acc_bytes", samples("чай"), results)  # per character 2.17 and 1.67, per byte 1.08 and 1.67
    assert results.figures[0].metric == "acc_bytes" and "another one win in 1 of 1 questions" in results.notes[0]


def test_harness_missing_is_said(data: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"expected `pip install fastgpt\[eval\]`"):
        HarnessTasks(benchmarks()["piqa"], data).check(target)
