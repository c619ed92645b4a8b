"""Augmentation: swapped terms, paraphrases and functions of the user make training rows, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_rows import write_rows
from chat_server import ChatServer, chat_server
from small_models import byte_tokenizer, model_that_says, run_of

from fastgpt.core.errors import UserError
from fastgpt.finetune.augment.rows import FORMATS, answer, asked, row_of, source_of, with_asked
from fastgpt.finetune.augment.swap import Terms
from fastgpt.finetune.config import FinetuneConfig, load_config
from fastgpt.finetune.data import Data, open_data
from fastgpt.inference.chat import Template

TERMS = """\
# pronouns
he, she
his > her   # her may be him or his
Anna, Omar
police officer, nurse
"""
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("terms.txt").write_text(TERMS)


def opened(rows: list[dict[str, Any]], *steps: dict[str, Any], task: str = "sft", **more: Any) -> Data:
    settings: dict[str, Any] = {
        "task": task,
        "base": "x",
        "data": str(write_rows(Path("a.jsonl"), *rows)),
        "out": "run",
    }
    cfg = FinetuneConfig(**{**settings, "val_fraction": 0.2, "augment": list(steps), **more})
    return open_data(cfg, byte_tokenizer(), "", Template(), 200)


def written() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("run/augmented.jsonl").read_text().splitlines()]


def texts(items: list[Any]) -> list[str]:
    return [byte_tokenizer().decode(item.ids).removesuffix("<|endoftext|>") for item in items]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("He said she ran. HE!", "She said he ran. SHE!"),
        ("the then-he, her and his", "the then-she, her and her"),
        ("His anna met ANNA and Omar", "Her omar met OMAR and Anna"),
        ("A Police officer; a nurse", "A Nurse; a police officer"),
        ("sheep help", "sheep help"),
    ],
)
def test_terms_are_swapped_as_whole_words_in_their_case(text: str, expected: str) -> None:
    assert Terms("terms.txt").swap(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("he, she\nhim, she", "terms.txt, line 2 gives 'she' the counterpart 'him', but it has 'he'"),
        ("he, she, they", "terms.txt, line 1 is 'he, she, they', expected two terms"),
        ("he, He", "line 1 is 'he, He', expected two terms"),
        ("# none", "terms.txt has no terms"),
    ],
)
def test_errors_in_a_file_of_terms(text: str, message: str) -> None:
    Path("terms.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        Terms("terms.txt")


ROWS: list[tuple[str, dict[str, Any]]] = [
    ("sft", {"text": "a"}),
    ("sft", {"prompt": "a", "completion": "b"}),
    ("sft", {"messages": CHAT}),
    ("sft", {"prompt": CHAT[:1], "completion": CHAT[1:], "tools": [{"name": "t"}]}),
    ("dpo", {"prompt": "a", "chosen": "b", "rejected": "c"}),
    ("dpo", {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [CHAT[1] | {"content": "c"}]}),
    ("kto", {"prompt": "a", "completion": "b", "label": False}),
    ("kto", {"prompt": "a", "chosen": "b", "rejected": "c"}),
    ("classify", {"text": "a", "label": "b"}),
    ("regress", {"text": "a", "label": 1.5}),
    ("tag", {"tokens": ["a", "b"], "tags": ["X", "Y"]}),
]


@pytest.mark.parametrize(("task", "row"), ROWS)
def test_a_source_is_a_row_and_back(task: str, row: dict[str, Any]) -> None:
    assert row_of(source_of(row, task)) == row
    assert set(FORMATS) == {"sft", "distil", "dpo", "orpo", "reward", "kto", "classify", "regress", "tag"}


def test_what_a_paraphrase_replaces_and_keeps() -> None:
    turns = [*CHAT, {"role": "user", "content": "again?"}, {"role": "assistant", "content": " yes"}]
    for row, text, kept in (
        ({"messages": turns}, "again?", "yes"),
        ({"prompt": turns[:3], "completion": turns[3:]}, "again?", "yes"),
        ({"prompt": "p", "chosen": " b", "rejected": "c"}, "p", "b"),
        ({"text": "good film", "label": "good"}, "good film", "good"),
        ({"text": "t", "label": 2}, "t", ""),
    ):
        assert (asked(row), answer(row)) == (text, kept)
        assert asked(with_asked(row, "new")) == "new" and asked(row) == text


HE = [{"prompt": f"He has {i}.", "completion": " he" if i % 2 else " it"} for i in range(10)]


def test_swapped_rows_are_added_to_training_alone_and_written_with_their_origin() -> None:
    rows = [*HE, {"prompt": "nobody", "completion": " x"}]
    data = opened(rows, {"name": "gender", "swap": "terms.txt"})
    plain = opened(rows)
    assert data.val.keys() == plain.val.keys() and texts(data.val["a.jsonl"]) == texts(plain.val["a.jsonl"])
    before, after = texts(plain.train["a.jsonl"]), texts(data.train["a.jsonl"])
    new = after[len(before) :]
    assert after[: len(before)] == before and data.augmented == {"gender": len(new)}
    he = [text for text in before if text.startswith("He")]
    assert new == [text.replace("He", "She").replace(" he", " she") for text in he]
    assert f"augment gender (swap terms.txt): {len(new)} rows added, of {len(he)} training rows" in "\n".join(data.said)
    assert data.describe() == f"a.jsonl: {len(after)} training ({len(new)} by gender) and 2 validation examples"
    row = written()[0]
    number = row["augmented"].pop("row")
    assert row.pop("augmented") == {"step": "gender", "kind": "swap", "data": "a.jsonl"}
    assert row == {k: v.replace("He", "She").replace(" he", " she") for k, v in rows[number - 1].items()}
    again = texts(opened(rows, {"name": "gender", "swap": "terms.txt"}).train["a.jsonl"])
    assert again == after


def test_a_share_of_the_rows_and_what_the_data_have_already() -> None:
    data = opened(HE, {"swap": "terms.txt", "share": 0.5})
    assert data.augmented == {"swap": 4}
    pairs = [{"prompt": f"{name} has {i}.", "completion": " x"} for i in range(5) for name in ("He", "She")]
    with pytest.raises(
        UserError, match=r"0 rows added, of 8 .*; 8 left out: in the data already; expected at least one"
    ):
        opened(pairs, {"swap": "terms.txt"})
    write_rows(Path("val.jsonl"), {"prompt": "She has 0.", "completion": " it"})
    data = opened(HE, {"swap": "terms.txt"}, val_data="val.jsonl", val_fraction=0.05)
    assert data.augmented == {"swap": 9}  # one of them is in the validation data


@pytest.mark.parametrize(
    ("task", "rows"),
    [
        ("classify", [{"text": f"he is {i}", "label": ("he", "b")[i % 2]} for i in range(6)]),
        ("tag", [{"tokens": ["he", str(i)], "tags": ["he", "b"]} for i in range(6)]),
        ("kto", [{"prompt": "is", "completion": f" he {i}", "label": True} for i in range(6)]),
        ("dpo", [{"prompt": "he", "chosen": f" he {i}", "rejected": f" it {i}"} for i in range(6)]),
    ],
)
def test_labels_are_kept_and_all_tasks_can_be_augmented(task: str, rows: list[dict[str, Any]]) -> None:
    data = opened(rows, {"swap": "terms.txt"}, task=task)
    assert data.augmented == {"swap": 5}
    for row in written():
        before = rows[row["augmented"]["row"] - 1]
        for key, value in before.items():
            kept = key in ("label", "tags", "rejected") or value == "is"
            assert row[key] == (value if kept else json.loads(json.dumps(value).replace("he", "she")))


def test_votes_by_people_can_be_augmented() -> None:
    votes = [{"prompt": "who?", "a": f" he {i}", "b": f" it {i}", "winner": "b", "rater": "x"} for i in range(4)]
    opened([votes[0], *votes], {"swap": "terms.txt"}, task="dpo")
    assert {(row["chosen"][:4], row["rejected"][:5]) for row in written()} == {(" it ", " she ")}


@pytest.fixture
def server() -> Iterator[ChatServer]:
    def reword(request: dict[str, Any]) -> str:
        instruction, _, text = request["messages"][-1]["content"].partition("\n\n")
        assert instruction.startswith("Reword")
        if text.startswith("He has 3"):
            return f" {text.upper()} "
        if text.startswith("He has 4"):
            return "no"
        return f"One has {text.removeprefix('He has ')}"

    with chat_server(reword) as state:
        yield state


def test_paraphrases_are_checked_and_asked_for_once(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row | {"completion": f" {row['prompt'][-2]}"} for row in HE]
    rows[5]["completion"] = " He"  # its answer is in the prompt and would be lost
    monkeypatch.setenv("MY_KEY", "secret")
    step = {"name": "reworded", "paraphrase": "m", "endpoint": server.url, "key_env": "MY_KEY", "shortest": 0.3}
    write_rows(Path("val.jsonl"), {"prompt": "v", "completion": " w"})
    data = opened(rows, step, val_data="val.jsonl", val_fraction=0.05)
    said = "\n".join(data.said)
    assert "7 rows added, of 10 training rows" in said
    assert all(f"1 left out: {why}" in said for why in ("equal to", "too short or too long", "the answer is lost"))
    assert written()[0]["prompt"] == "One has 0." and written()[0]["completion"] == " 0"
    assert len(server.requests) == 10 and server.headers[0]["Authorization"] == "Bearer secret"
    opened(rows, step, val_data="val.jsonl", val_fraction=0.05)
    assert len(server.requests) == 10
    cache = Path("run/paraphrases-reworded.jsonl")
    cache.write_bytes(b"".join(cache.read_bytes().splitlines(keepends=True)[:5]) + b'{"key')  # as if it was killed
    again = opened(rows, step, val_data="val.jsonl", val_fraction=0.05)
    assert len(server.requests) == 16 and texts(again.train["a.jsonl"]) == texts(data.train["a.jsonl"])
    with pytest.raises(UserError, match="paraphrases-reworded.jsonl was begun with another temperature"):
        opened(rows, step | {"temperature": 0.1}, val_data="val.jsonl", val_fraction=0.05)


def test_paraphrases_by_a_model_of_our_own() -> None:
    rows = [{"prompt": f"He has {i}.", "completion": " it"} for i in range(4)]
    encode, eot = byte_tokenizer().encode, byte_tokenizer().eot
    asked_with = encode("User: Reword.\n\nHe has 0.\nAssistant:").tolist()
    said = [*asked_with[1:], *encode(" It is 7.").tolist(), eot, *[0] * 30]
    model = run_of(model_that_says(said, 257), "own")
    step = {"paraphrase": model, "instruction": "Reword.", "max_tokens": 20, "temperature": 0}
    with pytest.raises(UserError, match="left out: longer than max_tokens; expected at least one"):
        opened(rows, {**step, "name": "short", "max_tokens": 3}, device="cpu")
    opened(rows, step, device="cpu")
    assert [row["prompt"] for row in written()] == ["It is 7."]  # the others are in the data already


HOOK = """\
def twice(row, random):
    if row["prompt"].startswith("He has 0"):
        return None
    new = dict(row, prompt=f"{random.random():.3f} {row['prompt']}")
    row["prompt"] = "it may be changed"
    return [new, dict(new, completion=" other")]

def wrong(row, random):
    return {"prompt": row["prompt"]}

def text(row, random):
    return "text"

def fails(row, random):
    return 1 / 0
"""


def test_a_function_of_the_user_makes_rows() -> None:
    Path("hook.py").write_text(HOOK)
    write_rows(Path("val.jsonl"), {"prompt": "v", "completion": " w"})
    more: dict[str, Any] = {"val_data": "val.jsonl", "val_fraction": 0.05}
    data = opened(HE, {"hook": "hook.py:twice"}, **more)
    assert data.augmented == {"hook": 18}
    prompts = [row["prompt"] for row in written()]
    assert len(set(prompts)) == 9 and all(prompt[5:].startswith(" He has ") for prompt in prompts)
    opened(HE, {"hook": "hook.py:twice"}, **more)
    assert [row["prompt"] for row in written()] == prompts
    for name, message in (
        ("wrong", "of row 1 of a.jsonl has a defect: the columns are prompt, expected"),
        ("text", "it returns 'text' for row 1 of a.jsonl, expected a row, a list of rows or None"),
        ("fails", r"it fails for row 1 of a.jsonl \(ZeroDivisionError: division by zero\)"),
        ("none", "augment hook: hook.py has no function 'none'"),
    ):
        with pytest.raises(UserError, match=message):
            opened(HE, {"hook": f"hook.py:{name}"}, **more)


REFUSED = {
    "[{swap: a, hook: b}]": r"augment\[0\] has swap and hook, expected one of swap, paraphrase and hook",
    "[{share: 0.5}]": r"augment\[0\] has neither, expected one of",
    "[{swap: a, max_tokens: 5}]": r"augment\[0\].max_tokens has no effect here: it only applies with paraphrase",
    "[{swop: a}]": r"augment\[0\].swop is not a key \(did you mean swap\?\)",
    "[{swap: a, share: 2}]": r"augment\[0\].share is 2.0, expected more than 0, at most 1",
    "[{swap: a, share: half}]": r'augment\[0\].share is "half", expected a number',
    "[{swap: a}, {swap: b}]": r"augment\[1\].name is 'swap' for the second time",
    "[{swap: a, name: a/b}]": r"augment\[0\].name is 'a/b', expected letters",
    "[{paraphrase: a, key_env: K}]": r"augment\[0\].key_env is 'K', expected none, or an endpoint",
    "[{paraphrase: a}] --task tag": "augment is 'paraphrase', expected swap or hook with task tag",
    "[{swap: a}] --task grpo --reward [a.py:b]": "augment is .*, but it has no effect here",
}


@pytest.mark.parametrize("options", REFUSED)
def test_settings_that_make_no_sense(options: str) -> None:
    value, _, more = options.partition("] ")
    words = ["--base", "x", "--data", "y", "--augment", value + ("]" if more else ""), *more.split()]
    with pytest.raises(UserError, match=REFUSED[options]) as raised:
        load_config(words)
    assert "\n" not in str(raised.value)


def test_what_a_step_needs_is_missing() -> None:
    for step, message in (
        ({"swap": "no.txt"}, "swap: no.txt cannot be read"),
        ({"hook": "no.py:f"}, "augment hook is 'no.py:f', expected a Python file and a function"),
        ({"paraphrase": "no"}, "no is not a folder, expected a run"),
        ({"paraphrase": "m", "endpoint": "http://x/v1", "key_env": "NO_KEY_HERE"}, "NO_KEY_HERE is not set"),
    ):
        with pytest.raises(UserError, match=message):
            opened(HE, step)
