"""A served deployment switches to another version: every request is answered; what does not start changes nothing."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

import httpx
from fastapi.testclient import TestClient
from serve.servers import write_model
from stand_in_link import StandInLink, stand_in

from fastgpt.core.errors import UserError
from fastgpt.serve.app import build_app
from fastgpt.serve.command import main
from fastgpt.serve.guard import Limits
from fastgpt.serve.rollout import actions, swap
from fastgpt.serve.rollout.state import State, Version, changing, write
from fastgpt.serve.rollout.swap import Rollouts
from fastgpt.serve.served import Served

BODY: dict[str, Any] = {"prompt": "a", "max_tokens": 50}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A deployment of three versions, of which the first one is served; the third one does not start."""
    monkeypatch.setattr(swap, "SECONDS", 0.02)
    versions = {n: Version(n, f"versions/{n}", f"runs/{n}", "f" * 64) for n in (1, 2, 3)}
    state = State(versions)
    state.note("init", 1, "ann")
    state.served.append(1)
    write(tmp_path, state)
    return tmp_path


def roll_out(folder: Path, number: int) -> None:
    with changing(folder) as state:
        state.note("roll-out", number, "ann", "a test")
        state.served.append(number)


def start(name: str, path: str) -> Served:
    version = Path(path).name
    if version == "3":
        raise UserError("versions/3 cannot be read")
    return stand_in(name, f"answer of version {version}", pause=0.005)


def served_in(folder: Path) -> tuple[TestClient, dict[str, Served]]:
    rollouts = Rollouts(start)
    models = {"m": rollouts.open("m", str(folder))}
    return TestClient(build_app(models, Limits(), parts=[rollouts.add])), models


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def more(found: list[str], count: int) -> Callable[[], bool]:
    """Return a function that says whether a list has grown by `count`."""
    before = len(found)
    return lambda: len(found) > before + count


def test_a_swap_under_requests_loses_none(folder: Path) -> None:
    client, models = served_in(folder)
    old = models["m"].link
    answers: list[str] = []
    stop = threading.Event()

    def ask(stream: bool) -> None:
        while not stop.is_set():
            answer = client.post("/v1/completions", json={**BODY, "stream": stream})
            if stream:
                events = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
                assert answer.text.endswith("data: [DONE]\n\n")
                answers.append("".join(choice["text"] for event in events for choice in event["choices"]))
            else:
                answers.append(answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer.text)

    with client:
        threads = [threading.Thread(target=ask, args=(i % 2 == 0,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for number in (2, 1, 2):
            until(more(answers, 8))
            roll_out(folder, number)
            until(more(answers, 8))
            until(functools.partial(lambda number: models["m"].version == number, number))
        until(more(answers, 16))
        stop.set()
        for thread in threads:
            thread.join()
        assert set(answers) == {"answer of version 1", "answer of version 2"}
        until(lambda: not old.alive)
        assert isinstance(old, StandInLink) and old.lost == 0
        (shown,) = client.get("/v1/models").json()["data"]
        assert (shown["id"], shown["version"]) == ("m", 2)
        assert 'fastgpt_rollout_version{model="m"} 2.0' in client.get("/metrics").text
    assert all(isinstance(served.link, StandInLink) and served.link.closed for served in models.values())


def test_the_old_engine_ends_after_its_last_call(folder: Path) -> None:
    """A call that has found the old model, and sent nothing to its engine yet, keeps it."""
    client, models = served_in(folder)
    with client:
        old = models["m"]
        with old.hold():
            roll_out(folder, 2)
            until(lambda: models["m"] is not old)
            time.sleep(4 * swap.SECONDS_TO_DRAIN)
            assert old.link.alive
        until(lambda: not old.link.alive)


def test_a_version_that_does_not_start_changes_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    client, models = served_in(folder)

    def failed() -> bool:
        return 'fastgpt_rollout_failed{model="m"} 1.0' in client.get("/metrics").text

    with client:
        assert not failed()
        roll_out(folder, 3)
        until(failed)
        assert client.post("/v1/completions", json=BODY).json()["choices"][0]["text"] == "answer of version 1"
        assert client.get("/ready").status_code == 200 and models["m"].version == 1
        time.sleep(0.2)
        assert [r.getMessage() for r in caplog.records if r.levelname == "ERROR"] == [
            "m: the roll-out failed, version 1 stays: versions/3 cannot be read"
        ]
        actions.roll_back(folder)
        until(lambda: not failed())
        assert models["m"].version == 1
        (folder / "deployment.json").rename(folder / "away")
        until(failed)
        (folder / "away").rename(folder / "deployment.json")
        until(lambda: not failed())


def test_a_server_that_ends_while_a_version_starts_ends_that_engine(folder: Path) -> None:
    started = threading.Event()
    found: list[Served] = []

    def slow(name: str, path: str) -> Served:
        if Path(path).name == "2":
            started.set()
            time.sleep(0.3)
        found.append(start(name, path))
        return found[-1]

    rollouts = Rollouts(slow)
    models = {"m": rollouts.open("m", str(folder))}
    with TestClient(build_app(models, Limits(), parts=[rollouts.add])):
        roll_out(folder, 2)
        assert started.wait(30)
    assert len(found) == 2 and not any(served.link.alive for served in found)


def test_adapters_of_a_deployment_are_refused(folder: Path) -> None:
    for words in (["--adapter", "a=runs/a"], ["--allow-adapter-changes", "runs"]):
        with pytest.raises(UserError, match="is a deployment, whose weights change, expected a model for adapters"):
            main([f"m={folder}", *words])


@pytest.mark.slow
def test_real_engines_are_swapped(tmp_path: Path) -> None:
    """`fastgpt serve DIR` under streams: a roll-out, and a version that cannot start."""
    for seed, name in enumerate(("old", "new")):
        write_model(tmp_path / name, seed)
    folder = tmp_path / "chat"
    actions.init(folder, str(tmp_path / "old"))
    actions.propose(folder, str(tmp_path / "new"))
    broken = actions.propose(folder, str(tmp_path / "new"))
    (folder / broken.folder / "tokenizer.json").unlink()
    command = [sys.executable, "-m", "fastgpt.cli", "serve", str(folder), "--port", "0", "--threads", "1"]
    body = {"prompt": "the", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            url = next(line for line in lines if "serving at" in line).split()[2].rstrip(";")
            client = httpx.Client(base_url=url, timeout=60)
            texts: list[str] = []
            stop = threading.Event()

            def ask() -> None:
                while not stop.is_set():
                    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
                    texts.append(answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer.text)

            threads = [threading.Thread(target=ask) for _ in range(4)]
            for thread in threads:
                thread.start()
            until(lambda: len(texts) > 8)
            actions.roll_out(folder, 2, "a test")
            until(lambda: client.get("/v1/models").json()["data"][0]["version"] == 2)
            until(more(texts, 8))
            actions.roll_out(folder, 3, "a test")
            until(lambda: 'fastgpt_rollout_failed{model="chat"} 1.0' in client.get("/metrics").text)
            until(more(texts, 8))
            stop.set()
            for thread in threads:
                thread.join()
            assert len(set(texts)) == 2 and texts[0] != texts[-1]
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            assert "version 2 stays" in process.stdout.read()
        finally:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
