"""The process that generates: it holds a model, and answers the requests of the server's process through one pipe.

Requests join and leave the running batch at any step. Messages are JSON, so nothing that comes from the network is
ever unpickled. The server starts a new engine when this one dies.

To the engine:      {"add": number, "request": {...}}   {"cancel": number}   {"stop": true}
                    {"change": number, "load": name, "path": path}   {"change": number, "unload": name}
From the engine:    {"ready": {...}} or {"failed": "sentence"} once, then after each step
                    {"pieces": [[number, a Piece's other values ...], ...], "running": requests,
                     "pages": {state: number}}
                    {"refused": number, "why": "sentence"} for a request that cannot run, or a change, and
                    {"changed": number} for a change of adapters that was made
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from fastgpt.core.errors import UserError
from fastgpt.evaluate.target import open_target
from fastgpt.inference import Generator, Piece, Request

log = logging.getLogger("fastgpt")
PREFILL_TOKENS = {"cpu": 256, "cuda": 2048}  # between two steps; on a CPU, more would delay others longer


@dataclass(frozen=True)
class Model:
    """A model to serve.

    Attributes:
        path: run, checkpoint or folder of a model.
        device: "auto", "cpu", "cuda" or "cuda:N".
        weights: "fp32", "bf16" or "int8"; None: as stored.
        rows: most requests that run at a time.
        context: most tokens of a text; None: as the model was trained.
        threads: of PyTorch on a CPU; None: all cores.
        adapters: paths by name.
        again: the model was served before; an adapter whose files have gone since then is left out.
        nice: added to the process's niceness; 19 is the lowest priority.
        cache_tokens: tokens of all texts in the cache; None: `rows` texts of the whole context.
        reuse: take keys and values of earlier texts that begin alike.
    """

    path: str
    device: str = "auto"
    weights: str | None = None
    rows: int = 16
    context: int | None = None
    threads: int | None = None
    adapters: dict[str, str] = field(default_factory=dict)
    again: bool = False
    nice: int = 0
    cache_tokens: int | None = None
    reuse: bool = True


def main(pipe: Connection, model: Model) -> None:
    """Run the process of an engine, until the pipe ends or a message stops it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server stops its engines
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if model.nice:
        os.nice(model.nice)
    try:
        generator = build(model)
    except (UserError, ValueError) as e:
        _send(pipe, {"failed": str(e)})
        return
    _send(pipe, {"ready": {"context": generator.context}})
    try:
        Engine(pipe, generator).run()
    except (EOFError, ConnectionError):  # the server is gone
        os._exit(0)


def build(model: Model) -> Generator:
    """Open a model and allocate its cache.

    Raises:
        UserError, ValueError: what does not fit.
    """
    if model.threads is not None:
        torch.set_num_threads(model.threads)
    target = open_target(model.path, device=model.device)
    options: dict[str, Any] = dict(max_batch=model.rows, context=model.context, weights=model.weights, adapters={})
    options |= dict(cache_tokens=model.cache_tokens, reuse=model.reuse)
    options["prefill_tokens"] = PREFILL_TOKENS[next(target.model.parameters()).device.type]
    generator = Generator(target.model, target.tokenizer, **options)
    for name, path in model.adapters.items():
        try:
            generator.adapters.load(name, path)
        except UserError as e:
            if not model.again:
                raise
            log.error("adapter %s is left out: %s", name, e)
    generator.reserve()
    generator.generate([Request([target.tokenizer.eot], 2)])  # what cannot run fails now, and kernels are compiled
    with suppress(UserError, ValueError):  # without llguidance, the server refuses what needs it
        generator.load_grammars()
    return generator


class Engine:
    """The loop of the process: read messages, run a step, send what it added."""

    def __init__(self, pipe: Connection, generator: Generator) -> None:
        self.pipe, self.generator = pipe, generator
        self.numbers: dict[int, int] = {}  # of the generator -> of the server
        self.stopped = False

    def run(self) -> None:
        while not self.stopped:
            busy = self.generator.busy
            while not self.stopped and self.pipe.poll(None if not busy else 0):
                self.take(json.loads(self.pipe.recv_bytes()))
                busy = True
            if not self.stopped:
                self.step()

    def take(self, message: dict[str, Any]) -> None:
        """Obey a message."""
        if "add" in message:
            number = message["add"]
            try:
                self.numbers[self.generator.add(Request.of_plain(message["request"]))] = number
            except (ValueError, UserError) as e:
                _send(self.pipe, {"refused": number, "why": str(e)})
        elif "change" in message:
            self.change(message)
        elif "cancel" in message:
            for own in [own for own, number in self.numbers.items() if number == message["cancel"]]:
                self.generator.cancel(own)
                del self.numbers[own]
            self._send_pieces([])
        else:
            self.stopped = True

    def change(self, message: dict[str, Any]) -> None:
        """Load or unload an adapter. The server knows which ones there are: one of this name is from before the engine
        was started again."""
        adapters, number = self.generator.adapters, message["change"]
        name: str = message["load"] if "load" in message else message["unload"]
        if name in adapters.named:
            adapters.unload(name)
        try:
            if "load" in message:
                adapters.load(name, message["path"])
        except UserError as e:
            _send(self.pipe, {"refused": number, "why": str(e)})
        else:
            _send(self.pipe, {"changed": number})

    def step(self) -> None:
        """Run one step and send what it added."""
        pieces = self.generator.step()
        for piece in [piece for piece in pieces if piece.error is not None and piece.number in self.numbers]:
            _send(self.pipe, {"refused": self.numbers.pop(piece.number), "why": piece.error})
        found = [self._plain(piece) for piece in pieces if piece.number in self.numbers]
        for piece in pieces:
            if piece.result is not None:
                self.numbers.pop(piece.number, None)
        if found:
            self._send_pieces(found)

    def _send_pieces(self, pieces: list[Any]) -> None:
        schedule = self.generator.schedule
        running = len(schedule.reading) + len(schedule.running)
        _send(self.pipe, {"pieces": pieces, "running": running, "pages": schedule.pages.counts()})

    def _plain(self, piece: Piece) -> list[Any]:
        result = None if piece.result is None else dataclasses.asdict(piece.result)
        return [self.numbers[piece.number], piece.id, piece.text, result, piece.logprob, piece.top_logprobs]


def _send(pipe: Connection, message: dict[str, Any]) -> None:
    pipe.send_bytes(json.dumps(message).encode())
