"""Votes by people as preference pairs and as rated completions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_rows import write_rows
from small_models import byte_tokenizer

from fastgpt.core.errors import UserError
from fastgpt.finetune.examples import Rows, load_pairs, load_ratings
from fastgpt.inference.chat import Template

EOT = "<|endoftext|>"


def vote(winner: str, rater: str = "", a: str = " yes", b: str = " no", prompt: Any = "ok?") -> dict[str, Any]:
    return {"prompt": prompt, "a": a, "b": b, "a_model": "x", "b_model": "y", "winner": winner, "rater": rater, "id": 1}


def thumb(response: str, thumb: str, prompt: Any = "ok?", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, "thumb": thumb, **more}


def texts(ids: Any) -> str:
    return byte_tokenizer().decode(ids).removesuffix(EOT)


def pairs(path: Path, **options: Any) -> tuple[list[tuple[str, str]], dict[str, int]]:
    loaded = load_pairs(path, byte_tokenizer(), Template(), 80, Rows(**options))
    found = [(texts(pair.chosen.ids), texts(pair.rejected.ids)) for pair in loaded.items]
    return found, dict(loaded.counts.left_out)


def test_the_most_frequent_verdict_on_an_item_counts_in_either_order_of_its_sides(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "a.jsonl",
        vote("b", "ann"),
        vote("a", "bob", a=" no", b=" yes"),
        vote("b", "cy", a=" no", b=" yes"),
        vote("a", prompt="other?"),
        vote("tie", prompt="tie?"),
        vote("both_bad", prompt="bad?"),
        vote("a", prompt="mute?", b=" "),
        *(vote(winner, prompt="tied?") for winner in ("a", "b", "tie")),
    )
    found, left = pairs(path)
    assert found == [("ok? no", "ok? yes"), ("other? yes", "other? no")]
    assert left == {"tie": 1, "both bad": 1, "tied votes": 1, "an empty text": 1}
    assert pairs(path, format="ratings") == (found, left)


def test_the_last_vote_of_a_rater_replaces_the_earlier_one(tmp_path: Path) -> None:
    rows = [vote("a", "ann"), vote("a", "bob"), vote("b", "ann"), vote("b", "bob")]
    assert pairs(write_rows(tmp_path / "a.jsonl", *rows))[0] == [("ok? no", "ok? yes")]


def test_messages_as_prompt_make_the_sides_replies(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", vote("b", a="yes", b="no", prompt=[{"role": "user", "content": "ok?"}]))
    assert pairs(path)[0] == [("User: ok?\nAssistant: no\n", "User: ok?\nAssistant: yes\n")]


def test_thumbs_of_one_prompt_make_pairs(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "a.jsonl",
        thumb(" never", "down"),
        thumb(" yes", "up"),
        thumb(" yes", "up"),
        thumb(" no", "down"),
        thumb(" sure", "up"),
        thumb(" fine", "up"),
        thumb(" hm", "up", prompt="and?"),
        thumb(" hm", "down", prompt="and?"),
    )
    found, left = pairs(path)
    assert found == [("ok? yes", "ok? never"), ("ok? sure", "ok? no")]
    assert left == {"no completion of the same prompt with the other thumb": 1, "tied votes": 1}


def test_both_kinds_are_rated_completions_for_kto(tmp_path: Path) -> None:
    def rated(*rows: dict[str, Any]) -> list[tuple[str, bool]]:
        path = write_rows(tmp_path / "a.jsonl", *rows)
        loaded = load_ratings(path, byte_tokenizer(), Template(), 80)
        return [(texts(item.example.ids), item.good) for item in loaded.items]

    assert rated(thumb(" yes", "up"), thumb(" no", "down")) == [("ok? yes", True), ("ok? no", False)]
    assert rated(vote("b", "ann"), vote("b", "bob")) == [("ok? no", True), ("ok? yes", False)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (vote("A"), r"line 2, .*field 'winner' is 'A', expected one of a, b, tie, both_bad"),
        (vote("a", b=" yes"), "line 2, .*a and b are equal"),
        (vote("a") | {"b": None}, "line 2, .*field 'b' is null"),
        (thumb("", "up"), "line 2, .*field 'response' is empty"),
        (thumb(" x", "top"), "line 2, .*field 'thumb' is 'top', expected up or down"),
        (thumb(" x", "up", prompt=None), "line 2, .*field 'prompt' is null"),
    ],
)
def test_defects_of_votes_are_named_or_left_out(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = vote("a") if "winner" in row else thumb(" yes", "up")
    more = [] if "winner" in row else [thumb(" no", "down")]
    path = write_rows(tmp_path / "a.jsonl", good, row, *more)
    with pytest.raises(UserError, match=message):
        pairs(path)
    found, left = pairs(path, defects="skip")
    assert found == [("ok? yes", "ok? no")] and sum(left.values()) == 1


def test_a_file_without_a_decision_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no row to train on, of 2: 1 both bad, 1 tie"):
        pairs(write_rows(tmp_path / "a.jsonl", vote("tie"), vote("both_bad", prompt="and?")))
