"""An endpoint that fails, is slow, is interrupted, and knows the labels; the journal of its replies."""

from __future__ import annotations

import email.utils
import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, chat_server

from fastgpt.core.errors import UserError
from fastgpt.finetune.asking.dialogue import LEFT_OUT, Ask, Dialogue, LeftOut
from fastgpt.finetune.asking.endpoint import Endpoint, retry_after
from fastgpt.finetune.asking.journal import Journal


def echo(request: dict[str, Any]) -> str:
    return f"said {request['messages'][-1]['content']}"


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server(echo) as state:
        yield state


def ask(text: str, **options: Any) -> Ask:
    return Ask([{"role": "user", "content": text}], **options)


def dialogue(text: str) -> Dialogue:
    (first,) = yield [ask(text, seed=1)]
    (second,) = yield [ask(first.text, seed=2)]
    return {"text": second.text}


def endpoint(server: ChatServer, **options: Any) -> Endpoint:
    return Endpoint(server.url, "m", **{"backoff": 0.01, "timeout": 60.0, "retries": 3, **options})


def test_records_come_in_order_with_no_more_requests_at_once_than_asked_for(server: ChatServer) -> None:
    three = threading.Barrier(3)

    def together(request: dict[str, Any]) -> str:
        if request["messages"][-1]["content"] in ("0", "1", "2"):
            three.wait(60)
        return echo(request)

    server.answer = together
    found = list(endpoint(server, at_once=3).records(dialogue(str(i)) for i in range(12)))
    assert [row["text"] for row in found] == [f"said said {i}" for i in range(12)]
    assert server.most == 3 and len(server.requests) == 24
    assert server.requests[0]["model"] == "m" and {r["seed"] for r in server.requests} == {1, 2}


def test_key_and_fields_of_the_body(server: ChatServer) -> None:
    endpoint(server, key="secret", body={"max_tokens": None, "max_completion_tokens": 9}).reply(ask("a"))
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert "max_tokens" not in server.requests[0] and server.requests[0]["max_completion_tokens"] == 9
    Endpoint(server.url + "/chat/completions", "m").reply(ask("a"))
    assert "Authorization" not in server.headers[1]


FAILURES: dict[str, Any] = {
    "429 with Retry-After": (429, {"Retry-After": "0.2"}, "slow down"),
    "500": (500, {}, "oops"),
    "529": (529, {}, "overloaded"),
    "cut body": "cut",
    "no JSON": (200, {}, "<html>"),
    "no choices": (200, {}, '{"choices": []}'),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_may_pass_is_asked_again(name: str, server: ChatServer) -> None:
    server.failures = [FAILURES[name]] * 2
    begun = time.monotonic()
    assert endpoint(server).reply(ask("a")).text == "said a" and len(server.requests) == 3
    assert "Retry-After" not in name or time.monotonic() - begun >= 0.4
    server.failures = [FAILURES[name]] * 9
    with pytest.raises(UserError, match="chat/completions .*, after 4 attempts; run the command again to continue"):
        list(endpoint(server).records([dialogue("a")]))


def test_silence_is_a_failure(server: ChatServer) -> None:
    server.failures = ["silence"]
    assert endpoint(server, timeout=0.5, retries=20).reply(ask("a")).text == "said a" and len(server.requests) > 1


def test_a_refused_request_is_left_out_unless_it_is_the_first(server: ChatServer) -> None:
    asked = endpoint(server, at_once=1, key="secret")
    server.failures = [(400, {}, "no such model; your key is secret")]
    with pytest.raises(UserError, match=r"answers 400 Bad Request \(no such model; your key is \*\*\*\)"):
        list(asked.records([dialogue("a")]))
    list(asked.records([dialogue("a")]))
    server.failures = [(400, {}, "filtered")]
    found = list(asked.records([dialogue("a"), dialogue("b")]))
    assert found == [{LEFT_OUT: "refused by the endpoint (400)"}, {"text": "said said b"}]
    server.failures = [(401, {}, "wrong key")]
    with pytest.raises(UserError, match="answers 401 Unauthorized"):
        list(asked.records([dialogue("a")]))


def test_a_redirect_is_not_followed_with_the_key(server: ChatServer) -> None:
    for status in (302, 307):
        server.failures = [(status, {"Location": server.url + "/chat/completions"}, "")]
        with pytest.raises(UserError, match=f"answers {status}"):
            endpoint(server, key="secret").reply(ask("a"))
    assert len(server.requests) == 2


def test_labels_are_summed_over_spellings_and_bounded_where_they_are_missing(server: ChatServer) -> None:
    def with_tokens(**top: float) -> dict[str, Any]:
        tokens = [{"token": token.replace("_", " "), "logprob": math.log(p)} for token, p in top.items()]
        return {"message": {"content": "A"}, "logprobs": {"content": [{"top_logprobs": tokens}]}}

    server.answer = lambda request: with_tokens(A=0.25, _A=0.25, _B=0.125, The=0.1)
    assert endpoint(server).reply(ask("a", labels=("A", "B"))).logprobs == pytest.approx(
        [math.log(0.5), math.log(0.125)]
    )
    assert server.requests[0]["top_logprobs"] == 20 and server.requests[0]["max_tokens"] == 1
    server.answer = lambda request: with_tokens(A=0.5, The=0.1)
    assert endpoint(server).reply(ask("a", labels=("A", "B"))).logprobs == pytest.approx([math.log(0.5), math.log(0.1)])
    server.answer = lambda request: with_tokens(The=0.1)
    with pytest.raises(LeftOut, match="none of the labels"):
        endpoint(server).reply(ask("a", labels=("A", "B")))
    server.answer = echo
    with pytest.raises(UserError, match="gives no top_logprobs"):
        endpoint(server).reply(ask("a", labels=("A", "B")))


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after("3") == 3.0 and retry_after("86400") == 600.0 and retry_after("-1") == 0.0
    assert retry_after(None) is None and retry_after("soon") is None and retry_after("nan") is None
    at = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 90 < (retry_after(at) or 0) <= 100


@pytest.mark.parametrize("url", ["", "example.org/v1", "ftp://example.org", "https://me:key@example.org/v1"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UserError, match="expected an address as in"):
        Endpoint(url, "m")


def test_an_unreachable_endpoint_is_one_sentence() -> None:
    with pytest.raises(UserError, match="cannot be reached .*refused") as raised:
        Endpoint("http://127.0.0.1:1/v1", "m", retries=0).reply(ask("a"))
    assert "\n" not in str(raised.value)


def test_a_journal_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "new" / "j.part"
    with Journal(path, {"model": "m"}) as journal:
        journal.add({"text": "one\u2028two"})
        journal.add({"text": "three"})
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with Journal(path, {"model": "m"}) as journal:
        assert journal.records == [{"text": "one\u2028two"}]
        journal.add({"text": "three"})
    assert path.read_bytes() == whole
    with pytest.raises(UserError, match="was begun with another model, seed; expected the same, or remove the file"):
        Journal(path, {"model": "n", "seed": 1})
    assert path.read_bytes() == whole
    path.write_bytes(b"x\n" + whole)
    with pytest.raises(UserError, match="is damaged"):
        Journal(path, {"model": "m"})
    path.write_text(json.dumps({"made_by": {}})[:5])  # cut off in its first line
    with Journal(path, {"model": "m"}) as journal:
        assert journal.records == []
