"""The server under load: nothing is lost, answered twice or kept, whatever some of the clients do."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

import httpx
from serve.servers import CONTEXT, server, until, write_model

from fastgpt.bench import soak
from fastgpt.bench._http import request
from fastgpt.bench.servers import Running, fastgpt_command, free_port, processes, started
from fastgpt.serve.command import listen
from fastgpt.serve.guard import Guard, Limits
from fastgpt.serve.metrics import Metrics
from fastgpt.serve.running import EventStream
from fastgpt.serve.served import Served

BODY = 20_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def here(folder: Path) -> Iterator[tuple[Served, httpx.Client]]:
    with server(folder) as found:
        yield found


@pytest.fixture
def process(folder: Path, tmp_path: Path) -> Iterator[Running]:
    port = free_port()
    command = fastgpt_command(folder, port, 1, 16, "--max-body", str(BODY))
    with started("fastgpt", command, port, tmp_path / "log") as found:
        yield found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="what a process holds is read from /proc")
def test_nothing_is_lost_or_kept(process: Running, tmp_path: Path) -> None:
    report = asyncio.run(soak.Soak(process.port, process.pid, BODY).run(12.0))
    assert report.faults == []
    assert all(report.answered[kind] >= soak.MIX[kind] for kind in soak.ORDINARY)
    assert all(report.answered[kind] for kind in ("mute", "leaves 200", "leaves early", "large", "malformed", "cut"))
    before, after = report.held
    assert after.pop("requests") == 0 and all(after[name] <= before[name] for name in before)
    assert report.memory_mb[1] < 1.05 * report.memory_mb[0] + 16, report.memory_mb
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log and "the engine ended" not in log
    assert httpx.get(f"http://127.0.0.1:{process.port}/ready").status_code == 200


def stream(url: Any, **more: Any) -> tuple[str, Any, list[str]]:
    """Return the text of a stream, its error, and why its parts end."""
    body = {"prompt": "a", "max_tokens": CONTEXT - 1, "temperature": 0, "ignore_eos": True, "stream": True, **more}
    text, error, ends = "", None, []
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
        if answer.status_code != 200:
            answer.read()
            return "", answer.json()["error"], []
        for line in filter(None, answer.iter_lines()):
            if line == "data: [DONE]":
                ends.append("done")
                continue
            event = json.loads(line.removeprefix("data: "))
            error = event.get("error", error)
            for choice in event.get("choices", []):
                text += choice["text"]
                ends += [choice["finish_reason"]] if choice["finish_reason"] else []
    return text, error, ends


@contextmanager
def paused(pid: int) -> Iterator[None]:
    """Stop a process while the block runs, so that what is sent to it waits."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@pytest.mark.slow
def test_all_clients_of_a_killed_engine_are_told(here: tuple[Served, httpx.Client]) -> None:
    served, client = here
    with ThreadPoolExecutor(24) as pool:
        url = str(client.base_url).rstrip("/")
        expected = stream(url)[0]
        pid = served.link._process.pid
        assert pid is not None
        with paused(pid):
            found = [pool.submit(stream, url) for _ in range(24)]
            until(lambda: served.link.load.requests == 24)
            os.kill(pid, signal.SIGKILL)
        for text, error, ends in (one.result() for one in found):
            assert (text, ends) == ("", []) and "the engine ended while the request ran" in error["message"]
        again = stream(url)
        while again[1] is not None:  # the next engine has not started
            assert "the engine" in again[1]["message"]
            again = stream(url)
        assert again[0] == expected and served.link.load.requests == 0


@contextmanager
def mute_client(client: httpx.Client) -> Iterator[socket.socket]:
    """A client that does not read an answer which is too long for the buffers of its connection."""
    body = {"prompt": "a", "max_tokens": CONTEXT - 1, "ignore_eos": True, "n": 64, "logprobs": 100, "stream": True}
    with socket.socket() as mute:
        mute.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        mute.connect(("127.0.0.1", client.base_url.port))
        mute.sendall(request("/v1/completions", body))
        mute.settimeout(120)
        yield mute


@pytest.mark.slow
def test_what_a_client_does_not_read_counts(here: tuple[Served, httpx.Client]) -> None:
    served, client = here
    with mute_client(client):
        until(lambda: served.link.load.requests == 64 and not served.link._unfinished)
        full = client.post("/v1/completions", json={"prompt": "a", "n": 20})
        assert full.status_code == 429 and served.link.load.requests == 64
    until(lambda: served.link.load.requests == 0)  # the server has noticed that it left


def test_a_client_that_never_reads_is_cut_off() -> None:
    closed, sent = [], list[Any]()

    async def events() -> AsyncGenerator[str, None]:
        try:
            while True:
                yield "data: 1\n\n"
        finally:
            closed.append(True)

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) > 3:
            await asyncio.Event().wait()  # the buffers are full

    asyncio.run(EventStream(events(), 0.05).stream_response(send))
    assert len(sent) == 4 and closed


def test_a_connection_that_takes_no_data_is_dropped_by_the_system() -> None:
    listening = listen("127.0.0.1", 0, stalled=2.0)
    with listening, socket.create_connection(listening.getsockname()), listening.accept()[0] as accepted:
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 2001


def test_a_body_that_does_not_arrive_is_refused() -> None:
    sent: list[Any] = []

    async def never() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    guard = Guard(None, Limits(upload=0.01), Metrics())
    asyncio.run(guard({"type": "http", "path": "/v1/completions", "headers": []}, never, send))
    assert sent[0]["status"] == 408 and b"did not arrive within 0.01 seconds" in sent[1]["body"]


@pytest.mark.slow
def test_a_signal_under_load_ends_the_server_after_all_answers(folder: Path, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    command = fastgpt_command(folder, port, 1, 4)
    with ThreadPoolExecutor(40) as pool, started("fastgpt", command, port, log) as process:
        url = f"http://127.0.0.1:{port}"
        expected = stream(url)[0]
        with ExitStack() as stack:
            for child in processes(process.pid)[1:]:
                stack.enter_context(paused(child))
            found = [pool.submit(stream, url) for _ in range(40)]
            until(lambda: "fastgpt_requests 40.0" in httpx.get(f"{url}/metrics").text)
            os.kill(process.pid, signal.SIGTERM)
        assert [one.result() for one in found] == [(expected, None, ["length", "done"])] * 40
    assert "Traceback" not in log.read_text()
