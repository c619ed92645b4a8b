"""Ask a server as many clients would, and time what comes: the load of `fastgpt bench serve`, in a separate process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from fastgpt.bench import _http


@dataclass(frozen=True)
class Ask:
    """A prompt of ids, and the number of tokens to add."""

    prompt: list[int]
    new: int


@dataclass(frozen=True)
class Wave:
    """What a load took.

    Attributes:
        seconds: from its start to the last answer.
        tokens: new tokens of all answers.
        first: seconds from each request to its first text.
        gaps: seconds between two texts of an answer.
    """

    seconds: float
    tokens: int
    first: list[float]
    gaps: list[float]

    @property
    def rate(self) -> float:
        """New tokens per second of all clients together."""
        return self.tokens / self.seconds


async def _client(port: int, asks: Iterator[Ask], first: list[float], gaps: list[float]) -> int:
    """Take one request after the other; return the new tokens.

    Raises:
        ValueError: an answer is not what was asked for.
    """
    tokens = 0
    for ask in asks:
        more = {"stream": True, "stream_options": {"include_usage": True}}
        body = {"prompt": ask.prompt, "max_tokens": ask.new, "temperature": 0, "ignore_eos": True, **more}
        usage, last = None, time.perf_counter()
        began = False
        async with _http.asked(port, _http.request("/v1/completions", body)) as answer:
            if answer.status != 200:
                raise ValueError(f"status {answer.status}: {(await answer.body())[:300]!r}")
            async for event in answer.events():
                usage = (event or {}).get("usage") or usage
                if event and event.get("choices") and event["choices"][0]["text"]:
                    now = time.perf_counter()
                    (gaps if began else first).append(now - last)
                    began, last = True, now
        if usage is None or usage["completion_tokens"] != ask.new:
            raise ValueError(f"an answer has usage {usage}, expected {ask.new} new tokens")
        tokens += ask.new
    return tokens


async def _all(port: int, asks: Sequence[Ask], clients: int) -> Wave:
    first, gaps, queue = list[float](), list[float](), iter(asks)
    start = time.perf_counter()
    tokens = await asyncio.gather(*(_client(port, queue, first, gaps) for _ in range(clients)))
    return Wave(time.perf_counter() - start, sum(tokens), first, gaps)


def drive(port: int, asks: Sequence[Ask], clients: int) -> Wave:
    """Run clients at once, of which each takes the next request when it has an answer.

    Raises:
        ValueError: an answer is not what was asked for.
    """
    return asyncio.run(_all(port, asks, clients))


def apart() -> ProcessPoolExecutor:
    """Return an executor whose one process runs `drive`, so that it takes no time of this one."""
    return ProcessPoolExecutor(1, get_context("spawn"))
