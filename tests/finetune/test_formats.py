"""Formats: what each kind of row becomes, and the defects that are named with their line and field."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from chat_rows import write_rows
from small_models import byte_tokenizer

from fastgpt.core.errors import UserError
from fastgpt.finetune.encode import Example
from fastgpt.finetune.examples import Rows, load_examples, load_labelled, load_pairs, load_ratings
from fastgpt.inference.chat import Template

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def parts(example: Example) -> tuple[str, str]:
    """Return the text that is not learned, and the text that is."""
    decode = byte_tokenizer().decode
    return decode(example.ids[~example.learned]), decode(example.ids[example.learned])


def examples(path: Path, context: int = 200, **options: Any) -> list[tuple[str, str]]:
    loaded = load_examples(path, byte_tokenizer(), Template(), context, Rows(**options))
    return [parts(e) for e in loaded.items]


EOT = "<|endoftext|>"
PAIR = ("User: hi\nAssistant:", f" yes\n{EOT}")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "hello"}, ("h", f"ello{EOT}")),
        ({"prompt": "a:", "completion": " b"}, ("a:", f" b{EOT}")),
        ({"prompt": "a: ", "completion": "b"}, ("a:", f" b{EOT}")),
        ({"prompt": "a:\n", "completion": f"b{EOT}"}, ("a:\n", f"b{EOT}")),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, PAIR),
        ({"messages": CHAT}, PAIR),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, CHAT[1]]}, PAIR),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}, PAIR),
        ({"instruction": "hi", "output": "yes", "input": ""}, PAIR),
        ({"instruction": "hi", "output": "yes", "input": "x"}, ("User: hi\n\nx\nAssistant:", f" yes\n{EOT}")),
    ],
)
def test_formats_of_examples(tmp_path: Path, row: dict[str, Any], expected: tuple[str, str]) -> None:
    assert examples(write_rows(tmp_path / "a.jsonl", row)) == [expected]


def test_files_of_all_kinds_in_a_folder(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b"}
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as f:
        f.write(json.dumps(row))
    (tmp_path / "b.json").write_text(json.dumps([row, row]))
    (tmp_path / "c.csv").write_text("prompt,completion\na,b\n")
    (tmp_path / "d.txt").write_text("plain")
    assert examples(tmp_path) == [("a", f"b{EOT}")] * 4 + [("p", f"lain{EOT}")]


def test_parquet_messages_have_no_null_fields(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    turns = [CHAT[0], CHAT[1] | {"tool_calls": None, "name": None}]
    pq.write_table(pa.Table.from_pylist([{"messages": turns}]), tmp_path / "a.parquet")
    template = Template("{% for m in messages %}{{ m.content }}{{ 1 if m.name is defined }}/{% endfor %}", "x")
    loaded = load_examples(tmp_path / "a.parquet", byte_tokenizer(), template, 50)
    assert parts(loaded.items[0]) == ("hi/", f"yes/{EOT}")


def test_columns_of_other_names_and_loss_on_everything(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"question": "ab", "answer": "c"})
    names = {"prompt": "question", "completion": "answer"}
    assert examples(path, columns=names) == [("ab", f"c{EOT}")]
    assert examples(path, columns=names, loss="all") == [("a", f"bc{EOT}")]


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a", "completion"', "the JSON is broken"),
        ("[1]", "the record is a list, expected an object"),
        ({"prompt": "a"}, "field 'completion' is missing"),
        ({"prompt": "a", "completion": None}, "field 'completion' is null"),
        ({"prompt": 5, "completion": "b"}, "field 'prompt' is a number, expected text"),
        ({"prompt": "a", "completion": " "}, "field 'completion' is empty"),
        ({"prompt": "a", "completion": EOT}, "the completion is empty"),
        ({"prompt": "a", "completion": "b\0"}, "field 'completion' holds a NUL"),
        ({"prompt": CHAT[:1], "completion": "b"}, "not both text"),
        ({"prompt": CHAT[:1], "completion": CHAT[:1]}, "field 'completion' has no message of the assistant"),
        ({"prompt": CHAT[:1], "completion": [{"role": "bot", "content": "x"}]}, r"'completion\[0\].role' is 'bot'"),
        ({"prompt": CHAT[:1], "completion": [{"role": "assistant"}]}, r"'completion\[0\].content' is missing"),
        (
            {"prompt": [{"role": "user", "content": f"a{EOT}"}], "completion": CHAT[1:]},
            r"field 'messages\[0\].content' contains <\|endoftext\|>",
        ),
    ],
)
def test_defects_have_file_line_and_field(tmp_path: Path, row: Any, message: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", GOOD, "", row, GOOD)
    with pytest.raises(UserError, match=message) as error:
        examples(path)
    assert f"{path}, line 3" in str(error.value)
    loaded = load_examples(path, byte_tokenizer(), Template(), 50, Rows(defects="skip"))
    assert len(loaded.items) == 2 and sum(loaded.counts.left_out.values()) == 1


def test_unknown_columns_name_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the columns are body, expected messages; conversations; prompt, completion"):
        examples(write_rows(tmp_path / "a.jsonl", {"body": "x"}))
    with pytest.raises(UserError, match="format is 'chat', expected auto or one of messages"):
        examples(write_rows(tmp_path / "a.jsonl", {"body": "x"}), format="chat")


@pytest.mark.parametrize(
    ("row", "prompt", "sides"),
    [
        ({"prompt": "a", "chosen": " b", "rejected": " c"}, "a", (" b", " c")),
        ({"chosen": "x one cat", "rejected": "x one catfish"}, "x one", (" cat", " catfish")),
        ({"chosen": "x one cat sat", "rejected": "x one catfish"}, "x one", (" cat sat", " catfish")),
        ({"chosen": "one cat", "rejected": "one cat sat"}, "one", (" cat", " cat sat")),
        ({"chosen": "A:\nyes", "rejected": "A:\nyet"}, "A:\n", ("yes", "yet")),
    ],
)
def test_pairs(tmp_path: Path, row: dict[str, Any], prompt: str, sides: tuple[str, str]) -> None:
    pairs = load_pairs(write_rows(tmp_path / "a.jsonl", row), byte_tokenizer(), Template(), 50).items
    assert [parts(side) for side in pairs[0]] == [(prompt, side + EOT) for side in sides]
    rated = load_ratings(tmp_path / "a.jsonl", byte_tokenizer(), Template(), 50).items
    assert [(parts(r.example)[1], r.good) for r in rated] == [(sides[0] + EOT, True), (sides[1] + EOT, False)]


def test_pairs_of_messages_with_the_prompt_in_both(tmp_path: Path) -> None:
    other = {"role": "assistant", "content": "no"}
    for more in ({}, {"prompt": "hi"}):
        path = write_rows(tmp_path / "a.jsonl", {"chosen": CHAT, "rejected": [CHAT[0], other]} | more)
        pair = load_pairs(path, byte_tokenizer(), Template(), 50).items[0]
        assert parts(pair.chosen) == PAIR and parts(pair.rejected) == (PAIR[0], f" no\n{EOT}")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are equal"),
        ({"prompt": "a", "chosen": "b", "rejected": CHAT}, "one side is text, the other a list"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "field 'rejected' is empty"),
        ({"prompt": "a", "chosen": "b " * 40 + "c", "rejected": "b " * 40 + "d"}, "equal where they fit the context"),
    ],
)
def test_defects_of_pairs(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_pairs(write_rows(tmp_path / "a.jsonl", row), byte_tokenizer(), Template(), 50)


def test_ratings(tmp_path: Path) -> None:
    rows = [GOOD | {"label": True}, GOOD | {"label": False}]
    loaded = load_ratings(write_rows(tmp_path / "a.jsonl", *rows), byte_tokenizer(), Template(), 50)
    assert [r.good for r in loaded.items] == [True, False]
    (tmp_path / "b.csv").write_text("prompt,completion,label\na,b,True\na,b,0\n")
    loaded = load_ratings(tmp_path / "b.csv", byte_tokenizer(), Template(), 50)
    assert [r.good for r in loaded.items] == [True, False]
    with pytest.raises(UserError, match="field 'label' is a number, expected true or false"):
        load_ratings(write_rows(tmp_path / "a.jsonl", GOOD | {"label": 1}), byte_tokenizer(), Template(), 50)


def test_labels(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"text": "good", "label": "pos"}, {"text": "bad", "label": "neg"})
    loaded = load_labelled(path, byte_tokenizer(), 50, "classification")
    assert loaded.labels == ("neg", "pos") and [c.label for c in loaded.items] == [1, 0]
    with pytest.raises(UserError, match=r"line 2, .*the label 'neg' is unknown, expected one of pos"):
        load_labelled(path, byte_tokenizer(), 50, "classification", labels=("pos",))
    path = write_rows(tmp_path / "a.jsonl", {"text": "a", "label": 2}, {"prompt": "b", "label": 0})
    assert load_labelled(path, byte_tokenizer(), 50, "classification").labels == ("0", "1", "2")
    with pytest.raises(UserError, match="the label 2 is unknown"):
        load_labelled(path, byte_tokenizer(), 50, "classification", labels=("x", "y"))
    codes = write_rows(tmp_path / "codes.jsonl", {"text": "a", "label": 10**9})
    with pytest.raises(UserError, match="has the label 1000000000, expected names"):
        load_labelled(codes, byte_tokenizer(), 50, "classification")
    assert [c.label for c in load_labelled(path, byte_tokenizer(), 50, "regression").items] == [2.0, 0.0]
    with pytest.raises(UserError, match="the label is 'x', expected a number"):
        load_labelled(write_rows(tmp_path / "b.jsonl", {"text": "a", "label": "x"}), byte_tokenizer(), 50, "regression")


def test_tags_are_on_the_first_token_of_each_word(tmp_path: Path) -> None:
    rows = [{"tokens": ["Über", "a"], "ner_tags": ["B", "O"]}, {"text": "x yz", "labels": ["O", "O"]}]
    loaded = load_labelled(write_rows(tmp_path / "a.jsonl", *rows), byte_tokenizer(), 50, "tags")
    assert loaded.labels == ("B", "O")
    assert [list(c.label) for c in loaded.items] == [  # type: ignore[arg-type]
        [0, -100, -100, -100, -100, -100, 1],  # Ü has two bytes
        [1, -100, 1, -100],
    ]
    with pytest.raises(UserError, match="there are 2 words and 1 labels"):
        load_labelled(
            write_rows(tmp_path / "b.jsonl", {"words": ["a", "b"], "tags": [0]}), byte_tokenizer(), 50, "tags"
        )
