"""The checks of a suite find what is wrong with it, and the templates pass them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data.recipes import built
from suite_files import items_of, run_part, write_rows, write_suite

from fastgpt.core.errors import UserError
from fastgpt.evaluate import suite_checks, suite_init
from fastgpt.evaluate.suite import suite_of
from fastgpt.evaluate.suite_checks import check_suite, near_duplicates, unbalanced
from fastgpt.evaluate.suite_file import read_suite
from fastgpt.evaluate.suite_items import Item
from fastgpt.evaluate.suite_settings import KINDS


def findings(path: Path, shards: Path | None = None) -> list[str]:
    return [str(f).replace(str(path.parent) + "/", "") for f in check_suite(read_suite(path), shards).findings]


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_passes_and_runs(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite_init.main([str(tmp_path / "mine"), "--kind", kind]) == 0
    path = tmp_path / "mine.yaml"
    assert f"fastgpt eval check {path}" in capsys.readouterr().out
    assert suite_checks.main([str(path)]) == 0
    out = capsys.readouterr().out
    assert f"suite mine: 3 items of kind {kind}, 0 shots" in out and out.endswith("0 errors, 0 warnings\n")
    results = run_part(suite_of(path))
    assert results.figures and all(f.n == 3 for f in results.figures)
    with pytest.raises(UserError, match="mine.yaml exists"):
        suite_init.main([str(path), "--kind", kind])


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"perplexity"}))
def test_what_a_template_leaves_out_can_be_put_in(kind: str, tmp_path: Path) -> None:
    """The commented keys are right once they are keys."""
    suite_init.main([str(tmp_path / "mine.yaml"), "--kind", kind])
    path = tmp_path / "mine.yaml"
    text = path.read_text().replace('# description: ""', 'description: "Say it."')
    text = text.replace("\n# examples", "\nexamples").replace("# shots: 5 ", "shots: 2 ")
    path.write_text(text)
    write_rows(tmp_path / "mine.examples.jsonl", items_of(kind, 2))
    if kind == "generation":
        write_rows(tmp_path / "mine.examples.jsonl", [{"prompt": f"p {i}", "reference": "r"} for i in range(2)])
    if kind == "classification":
        write_rows(tmp_path / "mine.examples.jsonl", [{"text": f"t {i}", "label": "fault"} for i in range(2)])
    assert suite_of(path).suite.settings.shots == 2
    if kind == "generation":
        judge = text[text.index("# judge") :].replace("\n# ", "\n").replace("# judge", "judge").split("\n")
        for chosen in ("regex", "schema", "model"):
            (tmp_path / "answer.json").write_text('{"type": "object"}')
            kept = [
                line
                for line in judge[1:]
                if line.startswith(f"  {chosen}") or (chosen == "model" and line[:4] == "    ")
            ]
            path.write_text("\n".join([text[: text.index("# judge")], judge[0], *kept]))
            write_rows(tmp_path / "mine.jsonl", [{"prompt": "p"}])
            assert getattr(suite_of(path).suite.settings.judge, chosen)


def test_repeated_items_are_found(tmp_path: Path) -> None:
    items = [{**item, "question": f"Which of the {i}"} for i, item in enumerate(items_of("choice", 5))]
    long = "Which of these animals did the farmer who lives near the river see in the morning of the first day of May"
    changed = {**items[1], "answer": (items[1]["answer"] + 1) % 3}
    near = [{**items[0], "question": f"{long}{end}"} for end in ("?", " now?")]
    found = findings(write_suite(tmp_path, "choice", [*items, items[2], changed, *near]))
    assert found == [
        "error    items are there twice: items.jsonl, line 6 is items.jsonl, line 3",
        "error    items have the same prompt and different answers: items.jsonl, line 7 and items.jsonl, line 2",
        "warning  items have nearly the same words (similarity 0.8 or more): "
        "items.jsonl, line 9 and items.jsonl, line 8",
    ]


def test_near_duplicates_are_those_of_all_pairs() -> None:
    items = [
        Item(str(i), "", f"the {i % 7} cats of house {i // 2} see {i // 20} dogs and {i % 2} hens today")
        for i in range(40)
    ]
    sets = suite_checks.shingle_sets([item.prompt for item in items], 3)
    wanted = [(i, j) for i in range(40) for j in range(i + 1, 40) if suite_checks.jaccard(sets[i], sets[j]) >= 0.8]
    assert near_duplicates(items) == wanted


@pytest.mark.parametrize(
    ("kind", "settings", "item", "error"),
    [
        ("choice", {}, {"question": "q", "choices": ["a", "a"], "answer": 0}, "error    all choices are equal"),
        ("choice", {}, {"question": "q", "choices": ["a", "b", "a"], "answer": 0}, "error    two choices are equal"),
        ("generation", {}, {"prompt": "p", "regex": "x*"}, "error    the regex matches the empty text"),
        (
            "generation",
            {"judge": {"regex": "x*", "full": True}},
            {"prompt": "p"},
            "error    the regex matches the empty",
        ),
        ("generation", {}, {"prompt": "say yes or no", "regex": "yes"}, "warning  the prompt matches the regex"),
        ("qa", {}, {"question": "q", "answers": ["The!"]}, "error    an answer is only articles or punctuation"),
        ("qa", {}, {"question": "Is the Moon big?", "answers": ["moon"]}, "warning  the prompt contains an answer"),
        ("span", {}, {"context": "c", "question": "q", "answers": ["z"]}, "warning  no answer is in the context"),
        (
            "choice",
            {},
            {"question": "a cat?", "choices": ["cat", "dog"], "answer": 0},
            "warning  the prompt contains the r",
        ),
        ("cloze", {"prompt": "{text} "}, {"text": "t", "answer": "a"}, "warning  the prompt ends with a space"),
        ("cloze", {}, {"text": "t", "answer": " a"}, "warning  an answer begins with a space"),
    ],
)
def test_items_that_cannot_fail(kind: str, settings: Any, item: Any, error: str, tmp_path: Path) -> None:
    found = findings(write_suite(tmp_path, kind, [item], **settings))
    assert len(found) == 1 and found[0].startswith(error) and found[0].endswith("items.jsonl, line 1")


def test_schemas_that_accept_everything(tmp_path: Path) -> None:
    path = write_suite(tmp_path, "generation", [{"prompt": "p"}], judge={"schema": {"title": "anything"}})
    assert findings(path) == ["error    the schema accepts every JSON value: suite.yaml"]
    path = write_suite(tmp_path, "generation", [{"prompt": "p"}], judge={"schema": {"type": "object"}})
    assert findings(path) == []


def test_balance(tmp_path: Path) -> None:
    choices = ["one thing", "two things", "much", "more"]
    items = [{"question": f"q {i}", "choices": choices, "answer": i % 2} for i in range(60)]
    report = check_suite(read_suite(write_suite(tmp_path, "choice", items)))
    assert (
        "0 50.0%, 1 50.0%, 2 0.0%, 3 0.0%; always the most common one has acc 0.5000, chance is 0.2500"
        in report.facts[0]
    )
    assert report.facts[1:3] == [
        "always the longest choice has acc 0.5000",
        "always the shortest choice has acc 0.0000",
    ]
    assert [f.text for f in report.findings] == [
        "the right choice is the longest one too often",
        "the right choice stands in one place too often",
    ]
    items = [{"text": f"t {i}", "label": "good" if i else "bad"} for i in range(10)]
    report = check_suite(read_suite(write_suite(tmp_path, "classification", items)))
    assert report.facts[0] == "labels: good 90.0%, bad 10.0%, so-so 0.0%; always the most common one has acc 0.9000"
    assert [str(f) for f in report.findings] == ["warning  no item has the label: so-so"]


def test_chance_alone_is_no_imbalance() -> None:
    items = [Item(str(i), "", "p", ("a",) * (3 + i % 2), i % 3) for i in range(90)]
    assert unbalanced(items) > 0.5
    skewed = [Item(str(i), "", "p", ("a",) * 4, 0 if i < 50 else i % 4) for i in range(90)]
    assert unbalanced(skewed) < 0.001


def test_items_in_training_documents_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"word{i}" for i in range(400)]
    documents = [" ".join(words[i : i + 40]) for i in range(0, 320, 40)]
    write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in [*documents, "alpha beta gamma"]])
    source = {"path": str(tmp_path / "texts.jsonl"), "format": "jsonl", "license": "MIT"}
    built(tmp_path, tmp_path / "built", sources={"t": source}, validation=0)
    items = [
        {"text": "Tell me: " + " ".join(words[50:64]).upper(), "answer": "yes"},  # 14 words of the second document
        {"text": " ".join(words[90:97]), "answer": "yes"},  # only 7, within a longer document
        {"text": "alpha, beta gamma", "answer": "no"},  # a short document as a whole
        {"text": "quite another text", "answer": "no"},
    ]
    path = write_suite(tmp_path, "cloze", items)
    capsys.readouterr()
    assert suite_checks.main([str(path), "--shards", str(tmp_path / "built")]) == 1
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "training data" in line)
    assert line.count(", line") == 2 and "line 1 (1 document)" in line and "line 3 (1 document)" in line
    assert "compared with 9 training documents" in out and "word5" not in out.lower() and "alpha" not in out
    with pytest.raises(UserError, match="does not exist"):
        suite_checks.main([str(path), "--shards", str(tmp_path / "nowhere")])


def test_the_command_lists_every_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = [*items_of("choice", 8), {"question": "q"}, {"question": "secret", "choices": ["a", "b"], "answer": 9}]
    assert suite_checks.main([str(write_suite(tmp_path, "choice", items))]) == 1
    out = capsys.readouterr().out
    assert "suite my-choice: 8 items of kind choice" in out and "secret" not in out
    assert "error    choices is missing: " in out and "error    answer is 9, expected a choice from 0 to 1: " in out
    assert "for two models, 20.0% of the items discordant: 8 items show no difference" in out
    assert out.splitlines()[-1].startswith("2 errors")
    with pytest.raises(UserError, match="has no items"):
        suite_checks.main([str(write_suite(tmp_path, "choice", []))])
