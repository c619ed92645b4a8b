"""A server on this machine that speaks /v1/chat/completions, and fails when a test wants it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], Any]


class ChatServer:
    """The address of a server, the requests that it got, and what it does with the next ones.

    Attributes:
        answer: from a request to the text of the reply, or to a whole choice.
        failures: what to do with the next requests instead: (status, headers, text), "cut" or "silence".
        most: the largest number of requests at the same time.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer, self.failures = answer, list[Any]()
        self.requests, self.headers = list[dict[str, Any]](), list[dict[str, str]]()
        self.most = self.now = 0
        self.lock, self.closed, self.url = threading.Lock(), threading.Event(), ""

    def body(self, request: dict[str, Any]) -> bytes:
        found = self.answer(request)
        choice = found if isinstance(found, dict) else {"message": {"content": found}, "finish_reason": "stop"}
        return json.dumps({"choices": [choice]}).encode()


@contextmanager
def chat_server(answer: Answer) -> Iterator[ChatServer]:
    """Run a server until the block ends."""
    state = ChatServer(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.requests.append(request)
                state.headers.append(dict(self.headers))
                state.now += 1
                state.most = max(state.most, state.now)
                failure = state.failures.pop(0) if state.failures else None
            try:
                self.handle_one(request, failure)
            finally:
                with state.lock:
                    state.now -= 1

        def handle_one(self, request: dict[str, Any], failure: Any) -> None:
            status, headers, body = 200, {}, b""
            if failure == "silence":
                state.closed.wait()
            if isinstance(failure, tuple):
                status, headers, text = failure
                body = text.encode()
            else:
                assert self.path == "/v1/chat/completions"
                body = state.body(request)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                self.wfile.write(body[: len(body) // 2] if failure == "cut" else body)
            except OSError:
                pass  # the client did not wait

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        state.closed.set()
        server.shutdown()
        server.server_close()
        thread.join()
