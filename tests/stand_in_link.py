"""A link to an engine that is no process: it answers with the text a test wants, a byte at a time."""

from __future__ import annotations

import asyncio
from typing import Any

from small_models import byte_tokenizer

from fastgpt.inference import Piece, Request, Result
from fastgpt.inference.chat import Template
from fastgpt.serve.engine import Model
from fastgpt.serve.link import EngineDied, Link, Load, Take
from fastgpt.serve.served import Served


class StandInLink(Link):
    """Answers every request with `text`, which is ASCII.

    Attributes:
        pause: seconds before each token.
        lost: requests that ran, or came, when it was closed.
        asked: the requests.
    """

    def __init__(self, text: str, pause: float = 0.0) -> None:
        self.model, self.queue, self.context, self.load, self.restarts = Model("stand-in"), 64, 256, Load(), 0
        self.text, self.pause, self.lost, self.closed = text, pause, 0, False
        self.asked: list[Request] = []
        self._tasks: dict[int, asyncio.Task[None]] = {}

    @property
    def alive(self) -> bool:
        return not self.closed

    def begin(self, request: Request, take: Take) -> int:
        number = len(self.asked)
        self.asked.append(request)
        self._tasks[number] = asyncio.create_task(self._answer(request, take))
        self.load.requests = len(self._tasks)
        return number

    def end(self, number: int) -> None:
        self._tasks.pop(number).cancel()
        self.load.requests = len(self._tasks)

    async def _answer(self, request: Request, take: Take) -> None:
        prompt = [int(token) for token in request.prompt]
        scored: dict[str, Any] = {}
        if request.prompt_logprobs is not None:
            scored["prompt_logprobs"] = [None, *[-1.0] * (len(prompt) - 1)]
            scored["prompt_top_logprobs"] = [[], *([(token, -1.0)] for token in prompt[1:])]
        if request.max_new_tokens == 0:
            take(Piece(0, None, "", Result([], "", "length", len(prompt), 0, **scored)))
            return
        ids = list(self.text.encode())
        if request.logprobs is not None:
            scored["logprobs"] = [-0.5] * len(ids)
        for i, token in enumerate(ids):
            await asyncio.sleep(self.pause)
            if self.closed:
                self.lost += 1
                take(EngineDied("the engine was closed"))
                return
            last = i == len(ids) - 1
            take(
                Piece(0, token, chr(token), Result(ids, self.text, "stop", len(prompt), 0, **scored) if last else None)
            )

    def close(self) -> None:
        self.closed = True


def stand_in(name: str, text: str, pause: float = 0.0) -> Served:
    """Return a model whose answers are all `text`."""
    return Served(name, byte_tokenizer(), Template(), StandInLink(text, pause))
