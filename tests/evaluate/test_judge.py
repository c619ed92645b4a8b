"""A judge behind a server: verdicts, tries, the file of verdicts, and failures that are never scored."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from suite_files import run_part, write_suite

from fastgpt.core.errors import UserError
from fastgpt.evaluate.judge import Judge, JudgeSettings, Question, rating, verdict
from fastgpt.evaluate.suite import suite_of

Reply = Callable[[str, int], tuple[int, str, dict[str, str]]]


class Server:
    """A server of chat completions. reply: (text, number of the request) -> status, text of the reply, headers."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.reply: Reply = lambda text, number: (200, "Rating: 4", {})
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path.startswith("/moved"):
                    return self.answer(302, b"", {"Location": f"http://127.0.0.1:{self.server.server_port}/v1/models"})
                self.answer(200 if self.headers.get("Authorization") != "Bearer wrong" else 401, b"{}", {})

            def do_POST(self) -> None:
                sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.asked.append(sent)
                    server.keys.add(self.headers.get("Authorization"))
                    number = len(server.asked)
                status, text, headers = server.reply(sent["messages"][0]["content"], number)
                self.answer(status, json.dumps({"choices": [{"message": {"content": text}}]}).encode(), headers)

            def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_ratings_are_kept_and_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    server.reply = lambda text, number: (
        200,
        f"It is fine.\nRating: {5 if 'good one' in text else 2}",
        {},
    )
    questions = [Question("p", "good one", "ref"), Question("p", "other")]
    settings = JudgeSettings(server.url, "m")
    first = Judge(settings, tmp_path)(questions)
    assert first.values == [1.0, 0.25] and (first.asked, first.kept, len(server.asked)) == (2, 0, 2)
    assert server.asked[0]["model"] == "m" and any(
        "Reference answer:\nref" in a["messages"][0]["content"] for a in server.asked
    )
    again = Judge(settings, tmp_path)(questions)
    assert again.values == first.values and (again.asked, again.kept, len(server.asked)) == (0, 2, 2)
    other = JudgeSettings(server.url, "m", rubric="Short is good.")
    Judge(other, tmp_path)(questions)
    assert len(server.asked) == 4  # another question
    text = (tmp_path / ".judge.jsonl").read_text()
    (tmp_path / ".judge.jsonl").write_text(text[:-5])  # a killed run
    assert Judge(other, tmp_path)(questions).kept == 1 and len(server.asked) == 5
    assert Judge(other, tmp_path)(questions).kept == Judge(settings, tmp_path)(questions).kept == 2
    assert "good one" not in text and "ref" not in text


def test_both_orders_cancel_a_preference_for_the_first_place(server: Server, tmp_path: Path) -> None:
    server.reply = lambda text, number: (200, "Verdict: A", {})
    settings = JudgeSettings(server.url, "m", style="versus")
    assert Judge(settings, tmp_path)([Question("p", "mine", "theirs")]).values == [0.5] and len(server.asked) == 2

    def fair(text: str, number: int) -> tuple[int, str, dict[str, str]]:
        first = text.split("Answer A:\n")[1].startswith("mine")
        return 200, f"Verdict: {'A' if first else 'B'}", {}

    server.reply = fair
    assert Judge(settings, tmp_path)([Question("q", "mine", "theirs")]).values == [1.0]


def test_votes_are_averaged(server: Server, tmp_path: Path) -> None:
    server.reply = lambda text, number: (200, f"Rating: {number}", {})
    verdicts = Judge(JudgeSettings(server.url, "m", votes=3), tmp_path)([Question("p", "a")])
    assert verdicts.values == [pytest.approx((0 + 0.25 + 0.5) / 3)] and server.asked[0]["temperature"] == 1


def test_other_tries_wait_as_long_as_the_server_says(server: Server, tmp_path: Path) -> None:
    waits: list[float] = []
    server.reply = lambda text, n: [(429, "", {"Retry-After": "7"}), (503, "", {}), (200, "Rating: 5", {})][n - 1]
    verdicts = Judge(JudgeSettings(server.url, "m"), tmp_path, waits.append)([Question("p", "a")])
    assert verdicts.values == [1.0] and waits == [7.0, 2.0]


def test_failures_are_counted_and_left_out(server: Server, tmp_path: Path) -> None:
    def reply(text: str, number: int) -> tuple[int, str, dict[str, str]]:
        if "number 0 is" in text:
            return 503, "", {}
        return 200, "I cannot say." if "number 1 is" in text else "Rating: 5", {}

    server.reply = reply
    model = {"url": server.url, "model": "m", "retries": 0}
    path = write_suite(
        tmp_path,
        "generation",
        max_new_tokens=2,
        judge={"model": model},
        items=[{"prompt": f"the number {i} is"} for i in range(4)],
    )
    results = run_part(suite_of(path))
    figure = results.figure("my-generation", "judge")
    assert figure is not None and (figure.value, figure.n) == (1.0, 2) and len(results.items[0].values) == 2
    assert "2 items left out without a verdict (no verdict in the reply: 1, status 503: 1)" in results.notes[1]
    server.reply = lambda text, number: (503, "", {})
    with pytest.raises(UserError, match=r"the judge gave no verdict on 2 items .*status 503: 2"):
        run_part(suite_of(path), limit=2)
    assert run_part(suite_of(path), limit=4).figures[0].n == 2  # the kept verdicts


def test_the_key_comes_from_the_environment_and_is_checked_first(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = JudgeSettings(server.url, "m", key="MY_KEY")
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(UserError, match="environment variable MY_KEY, which is not set"):
        Judge(settings, tmp_path).check()
    monkeypatch.setenv("MY_KEY", "wrong")
    with pytest.raises(UserError, match="refuses the key .401") as raised:
        Judge(settings, tmp_path).check()
    assert "wrong" not in str(raised.value)
    monkeypatch.setenv("MY_KEY", "right")
    Judge(settings, tmp_path).check()
    Judge(settings, tmp_path)([Question("p", "a")])
    assert server.keys == {"Bearer right"}


def test_a_refused_request_and_an_absent_server_are_errors(server: Server, tmp_path: Path) -> None:
    server.reply = lambda text, number: (400, "", {})
    with pytest.raises(UserError, match="refuses a request: 400"):
        Judge(JudgeSettings(server.url, "m"), tmp_path)([Question("p", "a")])
    with pytest.raises(UserError, match="is elsewhere .302"):  # the key stays here
        Judge(JudgeSettings(server.url.replace("/v1", "/moved"), "m"), tmp_path).check()
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(UserError, match="does not answer: Connection refused"):
        Judge(JudgeSettings(server.url, "m"), tmp_path).check()


def test_replies_are_read() -> None:
    assert rating("Rating: 2, no, rating: **4**", 5) == 0.75
    assert rating("Rating: 6", 5) is None and rating("4", 5) is None
    assert (verdict("Verdict: B", True), verdict("verdict: **A**", True), verdict("Verdict: TIE", False)) == (1, 0, 0.5)
    assert verdict("B", False) is None
    for wrong in ({"url": "here"}, {"scale": 1}, {"votes": 0}):
        with pytest.raises(ValueError, match="expected"):
            JudgeSettings(**{"url": "http://x/v1", "model": "m", **wrong})  # type: ignore[arg-type]
