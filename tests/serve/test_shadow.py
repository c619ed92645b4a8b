"""A shadow: compares on live calls, keeps no text, and never holds up or changes an answer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient
from serve.servers import write_model
from stand_in_link import StandInLink, stand_in

from fastgpt.core.errors import UserError
from fastgpt.serve.app import build_app
from fastgpt.serve.command import main
from fastgpt.serve.engine import Model
from fastgpt.serve.guard import Limits
from fastgpt.serve.served import Served, serve_model
from fastgpt.serve.shadow import Shadow

BODY: dict[str, Any] = {"prompt": "ab", "max_tokens": 50}


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def shadowed(candidate: Served, **options: Any) -> tuple[TestClient, Shadow]:
    shadow = Shadow(candidate, "m", options.pop("share", 1.0), options.pop("timeout", 60.0), **options)
    models = {"m": stand_in("m", "same"), "other": stand_in("other", "same")}
    return TestClient(build_app(models, Limits(), parts=[shadow.add])), shadow


def test_answers_are_compared(tmp_path: Path) -> None:
    candidate = stand_in("shadow", "same")
    report = tmp_path / "report.json"
    client, shadow = shadowed(candidate, file=report, flags=lambda text: ["s"] if text.startswith("s") else [])
    with client:
        for stream in (False, True):
            assert "same" in client.post("/v1/completions", json={**BODY, "n": 2, "stream": stream}).text or stream
        until(lambda: shadow.counts["compared"] == 2)
        assert isinstance(candidate.link, StandInLink)
        candidate.link.text = "another"
        chat = {"messages": [{"role": "user", "content": "ab"}]}
        for path in ("chat/completions", "messages", "responses"):
            body = {"input": "ab"} if path == "responses" else {**chat, "max_tokens": 50}
            assert client.post(f"/v1/{path}", json=body).status_code == 200
        client.post("/v1/completions", json={**BODY, "model": "other"})
        until(lambda: shadow.counts["compared"] == 5)
        found = client.get("/v1/shadow").json()
        assert 'fastgpt_shadow_calls_total{outcome="compared"} 5.0' in client.get("/metrics").text
        assert "fastgpt_generated_tokens_total 32.0" in client.get("/metrics").text  # 8 answers of clients
    assert found["calls"] == {"compared": 5, "dropped": 0, "refused": 0, "failed": 0}
    assert (found["live"], found["candidate"], found["answers"]) == ("m", "stand-in", 7)
    assert found["equal_answers"] == 4 / 7 and found["agreement"] == 1.0
    live, own = found["sides"]["live"], found["sides"]["candidate"]
    assert (live["bytes"], own["bytes"]) == (4, (4 * 4 + 3 * 7) / 7) and live["flags"] == {"s": 7}
    assert live["logprob_per_byte"] == own["logprob_per_byte"] == -1.0
    assert live["finish_reasons"] == {"stop": 7} and own["flags"] == {"s": 4}
    assert json.loads(report.read_text()) == found
    assert "same" not in report.read_text() and not candidate.link.alive


def test_a_busy_or_failing_candidate_holds_up_nobody() -> None:
    candidate = stand_in("shadow", "slow", pause=0.2)
    assert isinstance(candidate.link, StandInLink)
    candidate.link.model = Model("stand-in", rows=1)
    client, shadow = shadowed(candidate)
    with client:
        for _ in range(5):
            start = time.perf_counter()
            assert client.post("/v1/completions", json=BODY).json()["choices"][0]["text"] == "same"
        assert shadow.counts["dropped"] == 4 and time.perf_counter() - start < 60
        until(lambda: shadow.counts["compared"] == 1)
        candidate.link.closed = True
        assert client.post("/v1/completions", json=BODY).status_code == 200
        until(lambda: shadow.counts["failed"] == 1)
        candidate.link.closed, candidate.link.context = False, 3
        assert client.post("/v1/completions", json=BODY).status_code == 200
        until(lambda: shadow.counts["refused"] == 1)


def test_a_call_that_runs_as_the_server_ends_is_given_up() -> None:
    candidate = stand_in("shadow", "slow", pause=100.0)
    client, shadow = shadowed(candidate)
    with client:
        client.post("/v1/completions", json=BODY)
        until(lambda: candidate.link.load.requests == 1)
    assert not shadow.tasks and not candidate.link.alive and not shadow.counts


def test_the_share_is_that_of_the_calls() -> None:
    draws = iter([0.05, 0.5, 0.1, 0.099, 0.9])
    client, shadow = shadowed(stand_in("shadow", "same"), share=0.1, draw=lambda: next(draws))
    with client:
        for _ in range(5):
            client.post("/v1/completions", json=BODY)
        until(lambda: shadow.counts["compared"] == 2)


def test_options_without_a_shadow_are_an_error() -> None:
    with pytest.raises(UserError, match="--shadow-share is for --shadow, expected --shadow RUN"):
        main(["runs/tiny", "--shadow-share", "0.5"])
    with pytest.raises(UserError, match="--shadow-share is '2', expected a number"):
        main(["runs/tiny", "--shadow", "runs/new", "--shadow-share", "2"])


@pytest.mark.extended
def test_a_model_agrees_with_itself(tmp_path: Path) -> None:
    """A real engine: the log-probability of an answer is that which the engine gives for it."""
    folder = write_model(tmp_path / "model")
    live, candidate = (serve_model("m", Model(str(folder), "cpu", threads=1, nice=nice), 8) for nice in (0, 19))
    shadow = Shadow(candidate, "m", 1.0, 60.0)
    with TestClient(build_app({"m": live}, Limits(), parts=[shadow.add])) as client:
        body = {"prompt": "the cat", "max_tokens": 20, "temperature": 0}
        text = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        until(lambda: shadow.counts["compared"] == 1)
        found = client.get("/v1/shadow").json()
        prompt, added = live.tokenizer.prompt("the cat"), live.tokenizer.encode(text).tolist()
        body = {"prompt": [*prompt, *added], "max_tokens": 0, "echo": True, "logprobs": 0}
        logprobs = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]["token_logprobs"]
    assert found["equal_answers"] == 1.0 and found["sides"]["candidate"]["tokens"] == 20
    expected = sum(logprobs[len(prompt) :]) / len(text.encode())
    for side in found["sides"].values():
        assert side["logprob_per_byte"] == pytest.approx(expected, rel=1e-4)
