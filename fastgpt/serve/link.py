"""The server's end of an engine: start its process, send requests, hand out what comes back, start it again."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import multiprocessing
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.inference import Piece, Request, Result
from fastgpt.serve import engine

log = logging.getLogger("fastgpt")
SECONDS_TO_END = 10.0


class Refused(Exception):
    """The engine cannot run a request; the message says why."""


class EngineDied(Exception):
    """The engine's process ended while a request ran."""


class QueueFull(Exception):
    """Too many requests wait."""


@dataclass
class Load:
    """What an engine does now: requests that run, and requests in all."""

    running: int = 0
    requests: int = 0


class Link:
    """An engine, as the server's event loop uses it.

    Args:
        model: what it serves.
        queue: requests that may wait beside those that run.

    Raises:
        UserError: the engine cannot start.
    """

    def __init__(self, model: engine.Model, queue: int = 64) -> None:
        self.model, self.queue = model, queue
        self.context = 0
        self.load = Load()
        self.restarts = 0
        self._jobs: dict[int, Callable[[Any], None]] = {}  # number -> what takes its messages
        self._next = 0
        self._lock = threading.Lock()
        self._closed = False
        self._start()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def _start(self) -> None:
        """Start the process and wait until it has loaded the model."""
        methods = multiprocessing.get_context("spawn")
        self._pipe, end = methods.Pipe()
        self._process = methods.Process(target=engine.main, args=(end, self.model), daemon=True)
        with closing(end):
            self._process.start()
        try:
            answer = json.loads(self._pipe.recv_bytes())
        except EOFError:
            raise UserError(
                f"{self.model.path}: the engine ended while it loaded the model, expected it to run"
            ) from None
        if "failed" in answer:
            raise UserError(answer["failed"])
        self.context = answer["ready"]["context"]
        threading.Thread(target=self._read, args=(self._pipe,), daemon=True).start()

    def _read(self, pipe: Any) -> None:
        """Hand out the engine's messages until it ends; then fail its requests and start another one."""
        with suppress(EOFError, OSError):
            while True:
                self._hand_out(json.loads(pipe.recv_bytes()))
        with self._lock:
            jobs, self._jobs = self._jobs, {}
        for take in jobs.values():
            take(EngineDied("the engine ended while the request ran; send it again"))
        self.load = Load()
        if self._closed:
            return
        log.error("%s: the engine ended (exit code %s); starting another one", self.model.path, self._process.exitcode)
        try:
            self._start()
            self.restarts += 1
        except (UserError, OSError) as e:
            log.error("%s: the engine cannot be started again: %s", self.model.path, e)

    def _hand_out(self, message: dict[str, Any]) -> None:
        if "refused" in message:
            self._give(message["refused"], Refused(message["why"]), last=True)
            return
        self.load.running = message["running"]
        for number, token, text, result, *newest in message["pieces"]:
            found = None if result is None else Result(**result)
            self._give(number, Piece(number, token, text, found, *newest), last=found is not None)

    def _give(self, number: int, what: Any, last: bool) -> None:
        with self._lock:
            take = self._jobs.pop(number, None) if last else self._jobs.get(number)
            self.load.requests = len(self._jobs)
        if take is not None:
            take(what)

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._pipe.send_bytes(json.dumps(message).encode())
        except OSError:
            raise EngineDied("the engine is being started again; try again in a moment") from None

    async def stream(self, request: Request) -> AsyncIterator[Piece]:
        """Yield the pieces of a request as they come. Leaving the loop, or cancelling its task, cancels the request.

        Raises:
            QueueFull: too many requests wait.
            Refused: the engine cannot run it.
            EngineDied: its process ended.
        """
        loop, found = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def take(what: Any) -> None:
            with suppress(RuntimeError):  # the server has stopped
                loop.call_soon_threadsafe(found.put_nowait, what)

        with self._lock:
            if len(self._jobs) >= self.model.rows + self.queue:
                raise QueueFull(f"{len(self._jobs)} requests run or wait, expected fewer")
            number, self._next = self._next, self._next + 1
            self._jobs[number] = take
            self.load.requests = len(self._jobs)
        done = False
        try:
            values = {f.name: getattr(request, f.name) for f in dataclasses.fields(request)}
            self._send({"add": number, "request": values})
            while not done:
                piece = await found.get()
                if isinstance(piece, Exception):
                    done = True
                    raise piece
                done = piece.result is not None
                yield piece
        finally:
            if not done:
                with self._lock:
                    self._jobs.pop(number, None)
                    self.load.requests = len(self._jobs)
                with suppress(EngineDied):
                    self._send({"cancel": number})

    def close(self) -> None:
        """End the engine."""
        self._closed = True
        with suppress(EngineDied):
            self._send({"stop": True})
        self._process.join(SECONDS_TO_END)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(SECONDS_TO_END)
        self._pipe.close()
