"""The server's end of an engine: start its process, send requests, hand out what comes back, start it again."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import multiprocessing
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.inference import Piece, Request, Result
from fastgpt.serve import engine

log = logging.getLogger("fastgpt")
SECONDS_TO_END = 10.0
SECONDS_BETWEEN_STARTS = 5.0  # of an engine that cannot be started again
FIELDS = dataclasses.fields(Request)
Take = Callable[["Piece | Refused | EngineDied"], None]


class Refused(Exception):
    """The engine cannot run a request; the message says why."""


class EngineDied(Exception):
    """The engine's process ended while a request ran."""


class QueueFull(Exception):
    """Too many requests wait."""


@dataclass
class Load:
    """What an engine does now: requests that run, requests in all, and pages of its cache by state."""

    running: int = 0
    requests: int = 0
    pages: dict[str, int] = field(default_factory=dict)


class Link:
    """An engine, as the server's event loop uses it.

    Two threads write and read the pipe, so that an engine in a long step never holds up the event loop. Requests are
    registered and looked up in the event loop alone.

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
        self._jobs: dict[int, Take] = {}  # number -> what takes its messages
        self._unfinished = set[int]()  # those that the engine has
        self._next = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._outbox = SimpleQueue[Any]()
        self._closed = False
        self._start()
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._write, daemon=True).start()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def _start(self) -> None:
        """Start the process and wait until it has loaded the model."""
        methods = multiprocessing.get_context("spawn")
        self._pipe, end = methods.Pipe()
        model = replace(self.model, again=self.context > 0)
        self._process = methods.Process(target=engine.main, args=(end, model), daemon=True)
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

    def _read(self) -> None:
        """Hand out the messages of one engine after the other until the link is closed."""
        while True:
            with suppress(EOFError, OSError):
                while True:
                    self._in_loop(self._hand_out, json.loads(self._pipe.recv_bytes()))
            self._in_loop(self._fail_all)
            if self._closed:
                return
            self._process.join(SECONDS_TO_END)
            code = self._process.exitcode
            log.error("%s: the engine ended (exit code %s); starting another one", self.model.path, code)
            while not self._closed:
                try:
                    self._start()
                    self.restarts += 1
                    break
                except (UserError, OSError) as e:
                    log.error("%s: the engine cannot be started again: %s", self.model.path, e)
                self._in_loop(self._fail_all)
                time.sleep(SECONDS_BETWEEN_STARTS)

    def _write(self) -> None:
        """Send messages until the link is closed."""
        while (message := self._outbox.get()) is not None:
            try:
                self._pipe.send_bytes(json.dumps(message, default=dataclasses.asdict).encode())
            except OSError:
                if (number := message.get("add", message.get("change"))) is not None:
                    died = EngineDied("the engine is being started again; try again in a moment")
                    self._in_loop(self._give, number, died)

    def _in_loop(self, call: Callable[..., None], *arguments: Any) -> None:
        """Run a call in the event loop; without one there is no request."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the server has stopped
                self._loop.call_soon_threadsafe(call, *arguments)

    def _hand_out(self, message: dict[str, Any]) -> None:
        if "refused" in message:
            self._give(message["refused"], Refused(message["why"]))
            return
        if "changed" in message:
            self._give(message["changed"], None)
            return
        self.load.running, self.load.pages = message["running"], message["pages"]
        for number, token, text, result, *newest in message["pieces"]:
            found = None if result is None else Result(**result)
            self._give(number, Piece(number, token, text, found, *newest))

    def _give(self, number: int, what: Any) -> None:
        """Hand over a Piece, None for a change that was made, Refused or EngineDied."""
        if not isinstance(what, Piece) or what.result is not None:
            self._unfinished.discard(number)
        if number in self._jobs:
            self._jobs[number](what)

    def _fail_all(self) -> None:
        self.load.running = 0
        for number in list(self._unfinished):
            self._give(number, EngineDied("the engine ended while the request ran; send it again"))

    def begin(self, request: Request, take: Take) -> int:
        """Send a request from the event loop; return its number. `take` is called there with each piece, or with what
        went wrong. The request counts until `end`, so that the answers which clients do not read are bounded, too.

        Raises:
            QueueFull: too many requests wait.
        """
        self._loop = asyncio.get_running_loop()
        if len(self._jobs) >= self.model.rows + self.queue:
            raise QueueFull(f"{len(self._jobs)} requests run or wait, expected fewer")
        number, self._next = self._next, self._next + 1
        self._jobs[number] = take
        self._unfinished.add(number)
        self.load.requests = len(self._jobs)
        self._outbox.put({"add": number, "request": {f.name: getattr(request, f.name) for f in FIELDS}})
        return number

    def end(self, number: int) -> None:
        """Forget a request; one that runs is cancelled."""
        del self._jobs[number]
        self.load.requests = len(self._jobs)
        if number in self._unfinished:
            self._unfinished.remove(number)
            self._outbox.put({"cancel": number})

    async def load_adapter(self, name: str, path: str) -> None:
        """Load an adapter between two steps.

        Raises:
            Refused: it is damaged or does not fit.
            EngineDied: the engine ended.
        """
        await self._change({"load": name, "path": path})
        self.model = replace(self.model, adapters={**self.model.adapters, name: path})

    async def unload_adapter(self, name: str) -> None:
        """Unload an adapter; requests that run or wait with it are finished. Raises as `load_adapter`."""
        self.model = replace(self.model, adapters={n: p for n, p in self.model.adapters.items() if n != name})
        await self._change({"unload": name})

    async def _change(self, what: dict[str, Any]) -> None:
        self._loop = asyncio.get_running_loop()
        done = self._loop.create_future()
        number, self._next = self._next, self._next + 1
        self._jobs[number] = done.set_result
        self._unfinished.add(number)
        self._outbox.put({"change": number, **what})
        try:
            said = await done
        finally:
            del self._jobs[number]
            self._unfinished.discard(number)
        if said is not None:
            raise said

    def close(self) -> None:
        """End the engine."""
        self._closed = True
        self._outbox.put({"stop": True})
        self._outbox.put(None)
        self._process.join(SECONDS_TO_END)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(SECONDS_TO_END)
        self._pipe.close()
