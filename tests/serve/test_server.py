"""The server over HTTP: answers equal the generator's, wrong calls are one sentence, nothing outlives its client."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

import httpx
from serve.servers import CONTEXT, server, until, write_model

from fastgpt.evaluate.target import open_target
from fastgpt.inference import Generator, Request
from fastgpt.serve.guard import Limits
from fastgpt.serve.served import Served


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[tuple[Served, httpx.Client]]:
    with server(folder, limits=Limits(body=10_000)) as found:
        yield found


@pytest.fixture(scope="module")
def client(running: tuple[Served, httpx.Client]) -> httpx.Client:
    return running[1]


@pytest.fixture(scope="module")
def generator(folder: Path) -> Generator:
    target = open_target(str(folder), device="cpu")
    return Generator(target.model, target.tokenizer)


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Return the JSON of server-sent events, without the last one."""
    found = [line.removeprefix("data: ") for line in lines if line]
    assert found[-1] == "[DONE]"
    yield from map(json.loads, found[:-1])


def test_completions_are_those_of_the_generator(client: httpx.Client, generator: Generator) -> None:
    prompts = ["the cat", "ünï", "and on"]
    body = {"prompt": prompts, "max_tokens": 12, "temperature": 0.0, "n": 2, "logprobs": 3}
    answer = client.post("/v1/completions", json=body).json()
    asked = [Request(p, 12, temperature=0.0, logprobs=3) for p in prompts for _ in range(2)]
    expected = generator.generate(asked)
    assert [c["text"] for c in answer["choices"]] == [r.text for r in expected]
    assert [c["index"] for c in answer["choices"]] == list(range(6))
    for choice, result in zip(answer["choices"], expected):
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(result.logprobs, abs=1e-4)
    prompt_tokens, new = sum(r.prompt_tokens for r in expected) // 2, sum(len(r.ids) for r in expected)
    total = {"prompt_tokens": prompt_tokens, "completion_tokens": new, "total_tokens": prompt_tokens + new}
    assert answer["usage"] == {**total, "prompt_tokens_details": {"cached_tokens": 0}}


def test_seeds_follow_one_another(client: httpx.Client) -> None:
    body: dict[str, Any] = {"prompt": "the", "max_tokens": 10, "temperature": 2.0}
    both = client.post("/v1/completions", json={**body, "n": 2, "seed": 5}).json()["choices"]
    single = [client.post("/v1/completions", json={**body, "seed": s}).json()["choices"][0] for s in (5, 6)]
    assert [c["text"] for c in both] == [c["text"] for c in single] and both[0]["text"] != both[1]["text"]


def test_a_stream_is_the_whole_answer_in_parts(client: httpx.Client) -> None:
    body: dict[str, Any] = {"prompt": ["ü", "the"], "max_tokens": 15, "temperature": 1.5, "seed": 3, "logprobs": 1}
    whole = client.post("/v1/completions", json=body).json()
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", "/v1/completions", json=streamed) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        *parts, last = events(answer.iter_lines())
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    for i, choice in enumerate(whole["choices"]):
        own = [p["choices"][0] for p in parts if p["choices"][0]["index"] == i]
        assert "".join(p["text"] for p in own) == choice["text"]
        for name in ("tokens", "text_offset"):
            assert sum((p["logprobs"][name] for p in own), []) == choice["logprobs"][name]
        assert [p["finish_reason"] for p in own if p["finish_reason"]] == [choice["finish_reason"]]


def test_echo_scores_the_prompt(client: httpx.Client, generator: Generator) -> None:
    assert generator.tokenizer is not None
    ids = generator.tokenizer.prompt("the cat sat")
    body = {"prompt": [ids], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    (expected,) = generator.score([ids])
    values = choice["logprobs"]["token_logprobs"]
    assert values[0] is None and values[1:-1] == pytest.approx(expected, abs=1e-4)
    assert choice["text"].startswith("the cat sat")
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    only = client.post("/v1/completions", json={**body, "max_tokens": 0}).json()
    assert only["choices"][0]["text"] == "the cat sat" and only["usage"]["completion_tokens"] == 0


def test_chat(client: httpx.Client, generator: Generator) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]},
    ]
    body = {"messages": messages, "max_completion_tokens": 9, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    answer = client.post("/v1/chat/completions", json=body).json()
    text = "System: be brief\nUser: the cat\nAssistant:"
    (expected,) = generator.generate([Request(text, 9, temperature=0.0, stop=["User:"], logprobs=2)])
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text}
    assert [c["logprob"] for c in choice["logprobs"]["content"]] == pytest.approx(expected.logprobs, abs=1e-4)
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as streamed:
        parts = [p["choices"][0] for p in events(streamed.iter_lines())]
    assert parts[0]["delta"]["role"] == "assistant"
    assert "".join(p["delta"].get("content", "") for p in parts) == expected.text
    no_end = client.post("/v1/chat/completions", json={"messages": messages}).json()["usage"]
    assert no_end["total_tokens"] <= CONTEXT


WRONG: dict[str, tuple[int, str, dict[str, Any]]] = {
    "unknown parameter": (400, "max_token is not known", {"prompt": "a", "max_token": 3}),
    "unknown model": (404, "there is no model 'gpt-5', expected one of m", {"prompt": "a", "model": "gpt-5"}),
    "too long": (400, "the prompt has 65 tokens and 16 tokens are to be added, expected", {"prompt": [1] * 65}),
    "too many": (400, "expected at most 64 in all", {"prompt": "a", "max_tokens": 64}),
    "empty": (400, "prompt is empty", {"prompt": ""}),
    "missing": (400, "prompt is missing", {}),
    "no such id": (400, "the prompt has id 9999, expected 0 to", {"prompt": [9999]}),
    "temperature": (400, "temperature: ", {"prompt": "a", "temperature": -1}),
    "wrong type": (400, "max_tokens: ", {"prompt": "a", "max_tokens": "7"}),
    "penalty": (400, "presence_penalty: ", {"prompt": "a", "presence_penalty": 3}),
    "contradiction": (400, "stream_options is for stream", {"prompt": "a", "stream_options": {}}),
    "large": (413, "the body is too long, expected at most 10,000 bytes", {"prompt": "a" * 20_000}),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_call_is_one_sentence(case: str, client: httpx.Client) -> None:
    status, said, body = WRONG[case]
    for more in ({}, {"stream": True}):
        if case == "contradiction" and more:
            continue  # then it is none
        answer = client.post("/v1/completions", json={**body, **more})
        assert (answer.status_code, said in answer.json()["error"]["message"]) == (status, True), answer.text
    raw = client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert raw.status_code == 400 and "the body is not JSON" in raw.json()["error"]["message"]


def test_a_long_body_without_its_length_is_refused(client: httpx.Client) -> None:
    parts = (b'{"prompt": "' + b"a" * 5000 for _ in range(10))
    answer = client.post("/v1/completions", content=parts, headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_tokens(client: httpx.Client) -> None:
    found = client.post("/tokenize", json={"prompt": "ünï cat"}).json()
    assert found["count"] == len(found["tokens"]) and found["max_model_len"] == CONTEXT
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "ünï cat"}
    assert client.post("/detokenize", json={"tokens": [9999]}).status_code == 400
    eos = client.get("/tokenizer_info").json()["eos_token"]
    assert client.post("/tokenize", json={"prompt": eos}).json()["count"] == 1


def test_what_a_monitor_asks(client: httpx.Client) -> None:
    assert client.get("/health").text == "ok" and client.get("/ready").status_code == 200
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "m" and client.get("/v1/models/m").json() == model
    assert client.get("/v1/models/x").status_code == 404 and client.get("/nothing").status_code == 404
    before = client.get("/metrics").text
    usage = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3, "ignore_eos": True}).json()["usage"]
    after = client.get("/metrics").text

    def count(text: str) -> float:
        return float(
            next(line for line in text.splitlines() if line.startswith("fastgpt_generated_tokens_total")).split()[1]
        )

    assert count(after) - count(before) == usage["completion_tokens"] == 3


def test_a_prompt_that_begins_like_an_earlier_one_is_read_in_part(folder: Path) -> None:
    """Every API says how much, and pages are counted."""
    ids = [5, 7, 11] * 13  # a page has 32 tokens
    with server(folder, cache_tokens=CONTEXT) as (_, client):

        def ask(path: str, **body: Any) -> dict[str, Any]:
            usage: dict[str, Any] = client.post(path, json={"max_tokens": 2, "temperature": 0, **body}).json()["usage"]
            return usage

        told = [ask("/v1/completions", prompt=[*ids, n])["prompt_tokens_details"]["cached_tokens"] for n in (1, 2)]
        assert told == [0, 32]
        said = {"messages": [{"role": "user", "content": "the cat sat on the mat and ran to it; and on."}]}
        whole = ask("/v1/messages", **said)
        assert ask("/v1/messages", **said)["cache_read_input_tokens"] == 32
        assert ask("/v1/messages", **said)["input_tokens"] == whole["input_tokens"] - 32
        details = client.post("/v1/responses", json={"input": said["messages"], "max_output_tokens": 2}).json()["usage"]
        assert details["input_tokens_details"] == {"cached_tokens": 32}
        lines = client.get("/metrics").text.splitlines()
        assert "fastgpt_cached_prompt_tokens_total 128.0" in lines
        pages = {state: f'fastgpt_cache_pages{{model="m",state="{state}"}}' for state in ("used", "kept", "free")}
        found = {state: next(int(float(x.split()[-1])) for x in lines if x.startswith(p)) for state, p in pages.items()}
        assert found["used"] == 0 and found["kept"] + found["free"] == CONTEXT // 32


def long_call(**more: Any) -> dict[str, Any]:
    return {"prompt": "a", "max_tokens": CONTEXT - 1, "ignore_eos": True, "n": 32, "stream": True, **more}


def test_a_client_that_leaves_cancels_its_requests(running: tuple[Served, httpx.Client]) -> None:
    served, client = running
    with client.stream("POST", "/v1/completions", json=long_call()) as answer:
        next(answer.iter_lines())
    until(lambda: served.link.load.requests == 0)
    assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_limits_and_keys(folder: Path) -> None:
    limits = Limits(keys=("one", "two"), timeout=0.0)
    with server(folder, queue=1, limits=limits, rows=1) as (served, client):
        assert client.get("/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer three"}, {"authorization": "one"}):
            assert client.get("/v1/models", headers=headers).status_code == 401
        client.headers["authorization"] = "Bearer two"
        assert client.get("/v1/models").status_code == 200
        body = {"prompt": "a", "max_tokens": 40, "ignore_eos": True}
        late = client.post("/v1/completions", json=body)
        assert late.status_code == 504 and "--timeout" in late.json()["error"]["message"]
        full = client.post("/v1/completions", json={**body, "n": 3})
        assert full.status_code in (429, 504)
        until(lambda: served.link.load.requests == 0)


def test_a_full_queue_is_said_at_once(folder: Path) -> None:
    with server(folder, queue=1, rows=1) as (_, client):
        full = client.post("/v1/completions", json=long_call(n=3))
        assert full.status_code == 429 and full.headers["retry-after"] == "1"
        assert "the server is busy" in full.json()["error"]["message"]
        assert client.post("/v1/completions", json=long_call(n=2, stream=False)).status_code == 200


def test_clients_of_a_killed_engine_are_told_and_the_next_is_served(folder: Path) -> None:
    with server(folder) as (served, client):
        with client.stream("POST", "/v1/completions", json=long_call()) as answer:
            lines = answer.iter_lines()
            next(lines)
            pid = served.link._process.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            last = [line for line in lines if line][-1]
        assert "the engine ended while the request ran" in json.loads(last.removeprefix("data: "))["error"]["message"]
        until(lambda: client.get("/ready").status_code == 200)
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
        assert "fastgpt_engine_restarts 1.0" in client.get("/metrics").text
