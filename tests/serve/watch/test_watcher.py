"""A server that watches its answers. The model's answers are known: it says TEXT from the position of the prompt's end
on, whatever the prompt is."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("re2")

from serve.servers import TEXT, serving
from serve.watch.receivers import receiver, until
from small_models import model_that_says

from fastgpt.core.command import Parser
from fastgpt.core.errors import UserError
from fastgpt.data import train_tokenizer
from fastgpt.models.weights import save_pretrained
from fastgpt.serve.app import Part
from fastgpt.serve.engine import Model
from fastgpt.serve.feedback.route import Feedback
from fastgpt.serve.guard import Limits
from fastgpt.serve.served import Served, serve_model
from fastgpt.serve.watch import scorers
from fastgpt.serve.watch.baseline import Baselines
from fastgpt.serve.watch.options import add_options, watchers_of
from fastgpt.serve.watch.store import Store
from fastgpt.serve.watch.store_command import main as store_main

SAID = "on and on " * 20 + "the cat sat on the very bad mat; ran 555-1234 to it and on and on. I am sorry. "
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "the cat", "max_tokens": 140},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "the cat"}]},
    "/v1/responses": {"input": "the cat"},
    "/v1/messages": {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 125},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("models") / "m"
    tokenizer = train_tokenizer([TEXT * 20], 280)
    model = model_that_says(tokenizer.encode(SAID).tolist(), tokenizer.n_vocab)
    save_pretrained(model, folder, extra={"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot})
    tokenizer.save(folder / "tokenizer.json")
    found = serve_model("m", Model(str(folder), device="cpu", threads=1), 64)
    close, found.link.close = found.link.close, lambda: None  # type: ignore[method-assign]
    yield found
    close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files of flags."""
    (tmp_path / "rude.txt").write_text("very bad\nworse\n")
    (tmp_path / "phone.txt").write_text(r"\b\d{3}-\d{4}\b")
    (tmp_path / "s.py").write_text(
        "def long(prompts, completions):\n    return [float(len(c) > 60) for c in completions]\n"
        "def broken(prompts, completions):\n    raise ValueError(completions[0])\n"
    )
    return tmp_path


def watching(*argv: str) -> list[Part]:
    parser = Parser(prog="fastgpt serve")
    add_options(parser)
    return watchers_of(parser.parse_args(argv))


def flags_of(folder: Path) -> list[str]:
    return ["--flag-words", str(folder / "rude.txt"), "--flag-patterns", f"number={folder / 'phone.txt'}"]


def metric(client: httpx.Client, name: str) -> float:
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(f"{name} ")]
    return float(lines[0].rpartition(" ")[2]) if lines else 0.0


def flagged(client: httpx.Client, name: str, where: str = "answer") -> float:
    return metric(client, f'fastgpt_flags_total{{name="{name}",where="{where}"}}')


def said(client: httpx.Client, route: str, stream: bool, **more: Any) -> tuple[str, str | None]:
    """Return the text of an answer and why it ended."""
    body = {**ROUTES[route], "stream": stream, "temperature": 0, **more}
    if not stream:
        answer = client.post(route, json=body).json()
        if route == "/v1/responses":
            why = (answer["incomplete_details"] or {}).get("reason")
            return answer["output"][0]["content"][0]["text"], why
        if route == "/v1/messages":
            return answer["content"][0]["text"], answer["stop_reason"]
        choice = answer["choices"][0]
        return choice.get("text", choice.get("message", {}).get("content")), choice["finish_reason"]
    text, why = "", None
    with client.stream("POST", route, json=body) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if route == "/v1/responses":
                text += event["delta"] if event["type"] == "response.output_text.delta" else ""
                why = (event.get("response", {}).get("incomplete_details") or {}).get("reason") or why
            elif route == "/v1/messages":
                text += event.get("delta", {}).get("text", "")
                why = event.get("delta", {}).get("stop_reason") or why
            else:
                choice = event["choices"][0]
                text += choice.get("text", choice.get("delta", {}).get("content")) or ""
                why = choice["finish_reason"] or why
    return text, why


def test_flags_are_counted_and_sent(served: Served, folder: Path) -> None:
    with (
        receiver() as to,
        serving({"m": served}, Limits(), parts=watching(*flags_of(folder), "--webhook", to.url)) as client,
    ):
        for i, route in enumerate(ROUTES, 1):
            whole, streamed = said(client, route, False), said(client, route, True)
            assert whole == streamed and "the very bad mat; ran 555-1234 to" in whole[0]
            assert flagged(client, "rude") == flagged(client, "number") == 2 * i
        until(lambda: len(to.events) == 16)
        event = to.events[0]
        assert event["type"] == "flag.found" and set(event["data"]) == {"name", "where", "model", "id"}
        assert {e["data"]["name"] for e in to.events} == {"rude", "number"}
        assert flagged(client, "rude", "prompt") == 0


@pytest.mark.parametrize("route", [pytest.param(r, marks=[pytest.mark.slow] * ("chat" not in r)) for r in ROUTES])
def test_flags_end_answers(served: Served, folder: Path, route: str) -> None:
    with serving({"m": served}, Limits()) as client:
        plain, _ = said(client, route, False)
    with serving({"m": served}, Limits(), parts=watching(*flags_of(folder), "--on-flag", "stop")) as client:
        for stream in (False, True):
            text, why = said(client, route, stream)
            assert why == ("refusal" if route == "/v1/messages" else "content_filter")
            assert plain.startswith(text) and text.endswith("on the very ")
        assert flagged(client, "rude") == 2 and flagged(client, "number") == 0
        until(lambda: served.link.load.requests == 0)


@pytest.mark.slow
def test_an_answer_without_flags_is_whole(served: Served, folder: Path) -> None:
    """Pieces wait where flags stop answers, but none is lost, nor its log-probability."""
    body = {"prompt": "the cat", "max_tokens": 20, "temperature": 0, "logprobs": 1, "stream": True, "n": 2}
    found = []
    for watch in ([], watching(*flags_of(folder), "--on-flag", "stop")):
        with serving({"m": served}, Limits(), parts=watch) as client:
            lines = [line for line in client.post("/v1/completions", json=body).text.splitlines() if line]
            events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
            choices = [e["choices"][0] for e in events]
            found.append(sorted((c["index"], json.dumps(c, sort_keys=True)) for c in choices))
    assert sorted(map(repr, found[0])) == sorted(map(repr, found[1])) and len(found[0]) == 40


def test_the_recorder_outlives_what_nobody_foresaw(
    served: Served, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Baselines, "add", lambda *args: 1 // 0)
    options = ["--baseline", str(folder / "b.json"), "--store", str(folder / "store"), "--keep-texts"]
    with serving({"m": served}, Limits(), parts=watching(*options)) as client:
        for n in (1, 2):
            said(client, "/v1/completions", False, max_tokens=1)
            until(lambda n=n: len(list(Store(folder / "store").records())) == n)  # type: ignore[misc]
    assert "watching: compare failed (ZeroDivisionError)" in caplog.messages


def test_a_flagged_prompt(served: Served, folder: Path) -> None:
    prompt = {"prompt": ["fine", "it is worse"], "max_tokens": 1, "n": 2}
    with serving({"m": served}, Limits(), parts=watching(*flags_of(folder), "--flag-prompts")) as client:
        assert len(client.post("/v1/completions", json=prompt).json()["choices"]) == 4
        assert flagged(client, "rude", "prompt") == 1
    stop = watching(*flags_of(folder), "--flag-prompts", "--on-flag", "stop")
    with serving({"m": served}, Limits(), parts=stop) as client:
        for stream in (False, True):
            answer = client.post("/v1/completions", json={**prompt, "stream": stream})
            assert answer.status_code == 400 and answer.json()["error"]["code"] == "content_filter"
            assert "worse" not in answer.text
        chat = [{"role": "user", "content": "worse"}, {"role": "assistant", "content": "a"}]
        chat.append({"role": "user", "content": "b"})
        assert client.post("/v1/chat/completions", json={"messages": chat}).status_code == 400
        assert flagged(client, "rude", "prompt") == 3


def test_scorers(served: Served, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = ["--flag-scorer", f"long={folder / 's.py'}:long", "--flag-scorer", f"bad={folder / 's.py'}:broken"]
    with serving({"m": served}, Limits(), parts=watching(*options)) as client:
        assert len(said(client, "/v1/completions", True)[0]) > 60
        said(client, "/v1/completions", False, max_tokens=1)
        until(lambda: metric(client, 'fastgpt_watch_failures_total{part="scorer bad"}') >= 1)
        until(lambda: flagged(client, "long") == 1)
    assert "watching: scorer bad failed (ValueError)" in caplog.messages and "cat sat" not in caplog.text


@pytest.mark.slow
def test_a_scorer_that_hangs_delays_nobody(served: Served, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    rate = scorers.open_rater("s", f"{folder / 's.py'}:long", 0.5).rate
    hanging = scorers.Scorer("s", lambda *texts: rate(*texts) if go.wait() else [], 0.5)
    monkeypatch.setattr(scorers, "open_rater", lambda *args: hanging)
    watch = watching("--flag-scorer", f"s={folder / 's.py'}:long", "--store", str(folder / "store"))
    monkeypatch.setattr("fastgpt.serve.watch.recorder.QUEUE", 2)
    with serving({"m": served}, Limits(), parts=watch) as client:
        for _ in range(6):
            said(client, "/v1/completions", False)
        assert metric(client, 'fastgpt_watch_failures_total{part="queue"}') >= 3
        go.set()
        until(lambda: flagged(client, "s") >= 2)


@pytest.mark.slow
def test_drift_is_reported_once(served: Served, folder: Path) -> None:
    """The first answers are the baseline, of which a second server reads the file."""
    file = folder / "baseline.json"
    options = [*flags_of(folder), "--baseline", str(file), "--drift-window", "20"]

    def ask(client: httpx.Client, prompt: str, n: int, most: int) -> None:
        for at in range(0, n, 10):
            count = min(10, n - at)
            client.post("/v1/completions", json={"prompt": prompt, "max_tokens": most, "temperature": 0, "n": count})

    with serving({"m": served}, Limits(), parts=watching(*options)) as client:
        ask(client, "a", 19, 5)
        until(lambda: metric(client, 'fastgpt_drift_recorded{model="m"}') == 19)
        assert not file.exists()
        ask(client, "a", 1, 5)
        until(file.exists)
    recorded = json.loads(file.read_text())
    assert recorded["window"] == 20 and set(recorded["models"]["m"]) == {
        "refusal", "repetition", "toxicity", "prompt_tokens", "answer_tokens"
    }  # fmt: skip
    with (
        receiver() as to,
        serving({"m": served}, Limits(), parts=watching(*options[:-2], "--webhook", to.url)) as client,
    ):
        labels = '{measure="answer_tokens",model="m"}'
        ask(client, "a", 20, 5)
        until(lambda: metric(client, f"fastgpt_drift_value{labels}") == 5)
        assert metric(client, f"fastgpt_drift_alarm{labels}") == 0 and metric(client, f"fastgpt_drift_p{labels}") == 1
        ask(client, "a", 30, 140)
        until(lambda: metric(client, f"fastgpt_drift_value{labels}") == 140)
        assert metric(client, f"fastgpt_drift_alarm{labels}") == 1 and metric(client, f"fastgpt_drift_p{labels}") < 1e-3
        until(lambda: sum(e["type"] == "drift.began" for e in to.events) == 3)
        drift = [e["data"] for e in to.events if e["type"] == "drift.began"]
        assert {d["measure"] for d in drift} == {"answer_tokens", "toxicity", "repetition"}
        assert all(d["model"] == "m" and d["p"] < 0.01 for d in drift)
    with pytest.raises(UserError, match="--drift-window is 30, and .* has windows of 20"):
        watching(*options[:-1], "30")


def test_no_text_is_kept_unless_asked(served: Served, folder: Path, capfd: Any, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG, "fastgpt")
    options = [*flags_of(folder), "--flag-prompts", "--flag-scorer", f"bad={folder / 's.py'}:broken"]
    options += ["--baseline", str(folder / "b.json"), "--drift-window", "20", "--store", str(folder / "store")]
    with receiver() as to, serving({"m": served}, Limits(), parts=watching(*options, "--webhook", to.url)) as client:
        body = {"prompt": "my canary is worse", "max_tokens": 130, "temperature": 0, "user": "ann@example.org", "n": 20}
        client.post("/v1/completions", json=body)
        until((folder / "b.json").exists)
        metrics = client.get("/metrics").text
    out, err = capfd.readouterr()
    files = "".join(p.read_text() for p in folder.rglob("*") if p.is_file() and p.suffix not in (".txt", ".py"))
    seen = files + out + err + caplog.text + metrics + b"".join(to.bodies).decode()
    assert "rude" in files and not [word for word in ("canary", "ann@", "very bad", "cat sat") if word in seen]
    records = list(Store(folder / "store").records())
    assert len(records) == 20 and records[0]["flags"] == ["rude", "number"] and records[0]["prompt_flags"] == ["rude"]


@pytest.mark.slow
def test_texts_are_kept_and_forgotten(served: Served, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = str(folder / "store")
    parts = watching("--store", where, "--keep-texts", "--keep-days", "7")
    store = Store(where)
    parts.append(Feedback(store, (store,)).add)
    with serving({"m": served}, Limits(), parts=parts) as client:
        ids = [
            client.post(route, json={**ROUTES[route], "temperature": 0, **user}).json()["id"]
            for route, user in zip(ROUTES, ({"user": "ann"}, {"safety_identifier": "ann"}, {"user": "bob"}, {}))
        ]
        client.post("/v1/messages", json={**ROUTES["/v1/messages"], "metadata": {"user_id": "ann"}})
        until(lambda: len(list(store.records())) == 5)
        assert client.post("/v1/feedback", json={"id": ids[0], "rating": "up"}).status_code == 200  # ann's answer
        first, chat = store.find(ids[0]), store.find(ids[1])
        assert first is not None and first["prompt"] == "the cat" and "very bad" in first["answer"]
        assert chat is not None and chat["messages"] == [{"role": "user", "content": "the cat"}]
        assert first["user"] == chat["user"] == store.hash("ann") and first["flags"] == []
        assert store_main(["show", where]) == store_main(["export", where, "--user", "ann"]) == 0
        shown = capsys.readouterr().out
        assert "kept: prompts and answers; each record for at most 7 days" in shown and shown.count('"answer"') == 4
        assert store_main(["forget", where, "--user", "ann"]) == 0 and "deleted: 4 records" in capsys.readouterr().out
        client.post("/v1/completions", json={**ROUTES["/v1/completions"], "user": "ann"})
        until(lambda: len(store.export("ann")) == 1)
        assert {r["id"] for r in store.records()} >= set(ids[2:])


def test_settings_without_effect(folder: Path) -> None:
    assert watching() == []
    rude = str(folder / "rude.txt")
    for argv, message in (
        (["--flag-threshold", "1"], "--flag-threshold has no effect without --flag-scorer"),
        (["--flag-prompts"], "--flag-prompts has no effect without --flag-words or --flag-patterns"),
        (["--on-flag", "stop"], "--on-flag stop has no effect without"),
        (["--drift-window", "50"], "--drift-window has no effect without --baseline"),
        (["--drift-alpha", "0.1"], "--drift-alpha has no effect without --baseline"),
        (["--webhook", "http://x"], "--webhook has no effect without flags or --baseline"),
        (["--keep-texts"], "--keep-texts has no effect without --store"),
        (["--keep-days", "1"], "--keep-days has no effect without --store"),
        (["--flag-words", f"a={rude}", "--flag-patterns", f"a={rude}"], "two flags are named a"),
        (["--flag-words", rude, "--flag-words", rude], "two flags are named rude"),
        (["--flag-words", "a="], "--flag-words is 'a=', expected NAME=FILE"),
        (["--flag-words", str(folder / "none")], "none cannot be read"),
        (["--flag-scorer", "x.py:f"], "expected NAME=FILE.py:FUNCTION or NAME=RUN:LABEL"),
        (["--flag-scorer", "s=none:toxic"], "none:toxic is neither FILE.py:FUNCTION nor RUN:LABEL"),
        (["--flag-scorer", f"s={folder}:toxic"], "has no model with a task head"),
        (["--baseline", rude], "rude.txt cannot be read"),
        (["--baseline", f"{rude}/b.json"], "b.json cannot be written"),
        (["--store", str(folder)], "has other files, expected a store"),
    ):
        with pytest.raises(UserError, match=message):
            watching(*argv)
