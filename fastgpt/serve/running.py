"""Run the requests of a call on an engine: several at once, in time, and not after the client has gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing
from functools import partial
from typing import TypeVar

import anyio
from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Send

from fastgpt import inference
from fastgpt.inference import Piece, Result
from fastgpt.serve.errors import ApiError
from fastgpt.serve.link import EngineDied, Link, QueueFull
from fastgpt.serve.metrics import Metrics

T = TypeVar("T")
SECONDS_TO_SAY = 1.0  # that an error has to reach a client after its time is over


def error_of(e: Exception) -> ApiError:
    """Return the answer for what went wrong in an engine."""
    if isinstance(e, QueueFull):
        return ApiError(429, f"the server is busy: {e}", kind="rate_limit_error", headers={"Retry-After": "1"})
    if isinstance(e, EngineDied):
        return ApiError(503, str(e), kind="server_error", headers={"Retry-After": "5"})
    if isinstance(e, asyncio.TimeoutError):
        return ApiError(504, "the request took longer than the server allows (--timeout)", kind="timeout_error")
    return ApiError(400, str(e).removeprefix("Generator: "))


async def run(
    link: Link, requests: Sequence[inference.Request], metrics: Metrics, timeout: float
) -> AsyncIterator[tuple[int, Piece]]:
    """Yield (request, piece) of all requests as they come. Leaving the loop cancels the rest.

    Raises:
        ApiError: the queue is full, a request cannot run, the engine ended, or the time is over.
    """
    found = asyncio.Queue[tuple[int, Piece | Exception]]()
    last = [time.perf_counter()] * len(requests)
    begun = set[int]()

    def take(i: int, what: Piece | Exception) -> None:
        if isinstance(what, Piece):
            now = time.perf_counter()
            metrics.token(what, now - last[i], first=i not in begun)
            last[i] = now
            begun.add(i)
        found.put_nowait((i, what))

    over = asyncio.get_running_loop().call_later(timeout, take, -1, asyncio.TimeoutError())
    numbers: list[int] = []
    try:
        with metrics.running(len(requests)):
            for i, request in enumerate(requests):
                numbers.append(link.begin(request, partial(take, i)))
            left = len(requests)
            while left:
                i, what = await found.get()
                if isinstance(what, Exception):
                    raise error_of(what)
                left -= what.result is not None
                yield i, what
                if not found.empty():
                    await asyncio.sleep(0)  # others go on, and the loop notices that the client has left
    except QueueFull as e:
        raise error_of(e) from None
    finally:
        over.cancel()
        for number in numbers:
            link.end(number)


async def while_here(work: Awaitable[T], client: Request) -> T:
    """Return what `work` gives; cancel it if the client leaves. The body of the request has been read.

    Raises:
        ApiError: status 499, the client has left.
    """

    async def leaves() -> None:
        while (await client.receive())["type"] != "http.disconnect":
            pass

    task, left = asyncio.ensure_future(work), asyncio.create_task(leaves())
    try:
        await asyncio.wait([task, left], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has left")
        return task.result()
    finally:
        for one in (task, left):
            one.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def collect(pieces: AsyncIterator[tuple[int, Piece]], count: int) -> list[Result]:
    """Return the results of `count` requests.

    Raises:
        ApiError: as `run`.
    """
    results: dict[int, Result] = {}
    async with aclosing(pieces) as all_pieces:  # type: ignore[type-var]
        async for i, piece in all_pieces:
            if piece.result is not None:
                results[i] = piece.result
    return [results[i] for i in range(count)]


class EventStream(StreamingResponse):
    """Server-sent events. A client that does not read them is cut off after `seconds`.

    Args:
        events: closed when the response ends, however it does.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], seconds: float) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.events, self.seconds = events, seconds

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self.events):
            with anyio.move_on_after(self.seconds):
                await super().stream_response(send)
