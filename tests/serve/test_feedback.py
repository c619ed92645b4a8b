"""Thumbs over HTTP, kept once for each user, and exported as rows that `fastgpt finetune` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient
from small_models import byte_tokenizer
from stand_in_link import stand_in

from fastgpt.core.errors import UserError
from fastgpt.finetune.examples import load_pairs, load_ratings
from fastgpt.inference.chat import Template
from fastgpt.serve.app import build_app
from fastgpt.serve.feedback.command import main
from fastgpt.serve.feedback.route import Feedback
from fastgpt.serve.guard import Limits
from fastgpt.serve.watch.store import Store

ASKED = [{"role": "user", "content": "Open?"}]
TEXTS: dict[str, Any] = {"messages": ASKED, "answer": "Yes."}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", create=True)


@pytest.fixture
def client(store: Store) -> Iterator[TestClient]:
    with TestClient(build_app({"m": stand_in("m", "Yes.")}, Limits(), parts=[Feedback(store, (store,)).add])) as found:
        yield found


def give(client: TestClient, id: str = "x", **body: Any) -> Any:
    answer = client.post("/v1/feedback", json={"id": id, **body})
    return answer.json() if answer.status_code == 200 else (answer.status_code, answer.json()["error"]["message"])


def exported(store: Store, tmp_path: Path, form: str = "preference") -> list[dict[str, Any]]:
    out = tmp_path / f"{form}.jsonl"
    assert main(["export", str(store.folder), "--out", str(out), "--format", form]) == 0
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_thumbs_become_pairs_and_ratings(
    client: TestClient, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for id, answer, rating in (("1", "Yes.", "up"), ("2", "Go away.", "down"), ("3", "Sì.", "up"), ("4", " ", "down")):
        said = give(client, id, rating=rating, messages=ASKED, answer=answer)
        assert said == {"object": "feedback", "id": id, "index": 0, "rating": rating}
    give(client, "5", rating="down", prompt="def ", answer="x")
    give(client, "6", chosen=" a", rejected=" b", prompt="def ")
    pairs = exported(store, tmp_path)
    assert pairs == [
        {"prompt": "def ", "chosen": " a", "rejected": " b"},
        {
            "prompt": ASKED,
            "chosen": [{"role": "assistant", "content": "Yes."}],
            "rejected": [{"role": "assistant", "content": "Go away."}],
        },
    ]
    left = capsys.readouterr().out
    assert "2 rows; left out: " in left and "empty answers: 1" in left and "has the other thumb: 2" in left
    rated = exported(store, tmp_path, "kto")
    assert [(row["completion"], row["label"]) for row in rated if row["prompt"] == "def "] == [
        (" a", True),
        ("x", False),
        (" b", False),
    ]
    assert [row["label"] for row in rated if row["prompt"] == ASKED] == [True, True, False]
    found = load_pairs(tmp_path / "preference.jsonl", byte_tokenizer(), Template(), 200)
    assert len(found.items) == 2 and not found.counts.left_out
    good = load_ratings(tmp_path / "kto.jsonl", byte_tokenizer(), Template(), 200)
    assert [one.good for one in good.items] == [row["label"] for row in rated] and not good.counts.left_out


def test_a_second_thumb_replaces_the_first(client: TestClient, store: Store, tmp_path: Path) -> None:
    for user, rating in (("ann", "up"), ("bob", "down"), ("ann", "down")):
        give(client, "1", rating=rating, user=user, **TEXTS)
    assert exported(store, tmp_path, "kto")[0]["label"] is False
    give(client, "1", rating="up", user="bob", **TEXTS)  # now one for and one against
    with pytest.raises(UserError, match=r"has no ratings \(answers without a majority: 1\), expected thumbs"):
        exported(store, tmp_path, "kto")
    give(client, "1", rating="none", user="bob", **TEXTS)
    assert exported(store, tmp_path, "kto")[0]["label"] is False
    assert not any("ann" in json.dumps(record) for record in store.records("feedback"))
    assert store.forget("ann") == 2
    with pytest.raises(UserError, match="has no ratings, expected"):
        exported(store, tmp_path, "kto")


def test_users_who_compare_the_other_way_are_no_majority(client: TestClient, store: Store, tmp_path: Path) -> None:
    for user, chosen, rejected in (("ann", "a", "b"), ("bob", "b", "a"), ("cy", "b", "a")):
        give(client, "1", chosen=chosen, rejected=rejected, user=user, messages=ASKED)
    assert [row["chosen"][0]["content"] for row in exported(store, tmp_path)] == ["b"]
    give(client, "1", chosen="a", rejected="b", user="di", messages=ASKED)
    with pytest.raises(UserError, match="comparisons without a majority: 2"):
        exported(store, tmp_path)


def test_the_store_knows_the_answer(client: TestClient, store: Store) -> None:
    store.add({"id": "chatcmpl-1", "model": "m", "user": store.hash("ann"), "messages": ASKED, "answer": "Yes."})
    assert give(client, "chatcmpl-1", rating="up", comment="right")["rating"] == "up"
    give(client, "chatcmpl-1", rating="up", prompt="something", answer="else")
    for record in store.records("feedback"):
        assert (record["model"], record["messages"], record["answer"]) == ("m", ASKED, "Yes.")
    assert store.forget("ann") == 3  # the thumbs have the texts of the answer
    said = "the server has no answer 'other', expected prompt or messages, and answer with the feedback"
    assert give(client, "other", rating="up") == (404, said)
    assert give(client, "other", rating="up", prompt="a") == (404, said)
    assert give(client, "other", chosen="a", rejected="b")[0] == 404


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({}, "expected either rating, or chosen and rejected"),
        ({"rating": "up", "chosen": "a", "rejected": "b"}, "expected either rating, or chosen and rejected"),
        ({"chosen": "a"}, "expected either rating, or chosen and rejected"),
        ({"chosen": "a", "rejected": "a"}, "chosen and rejected are equal"),
        ({"rating": "good"}, "rating: input should be 'up', 'down' or 'none'"),
        ({"rating": "up", "prompt": "a", **TEXTS}, "prompt and messages are both given"),
        ({"chosen": "a", "rejected": "b", **TEXTS}, "answer is for rating"),
        ({"rating": "up", "stars": 5}, "stars is not known"),
    ],
)
def test_wrong_feedback_is_one_sentence(client: TestClient, store: Store, body: dict[str, Any], why: str) -> None:
    status, said = give(client, **body)
    assert status == 400 and why in said and not list(store.records())


def test_thumbs_are_shown_only_where_they_are_kept(client: TestClient) -> None:
    assert '<html lang="en" data-feedback>' in client.get("/").text
    with TestClient(build_app({"m": stand_in("m", "Yes.")}, Limits())) as other:
        assert '<html lang="en">' in other.get("/").text and other.post("/v1/feedback", json={}).status_code == 404


def test_wrong_commands(tmp_path: Path, store: Store) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match="is not a store"):
        main(["export", str(tmp_path / "none"), "--out", str(out)])
    with pytest.raises(UserError, match="has no pairs, expected thumbs up and down"):
        main(["export", str(store.folder), "--out", str(out)])
    assert not out.exists()
