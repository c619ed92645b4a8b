"""Run the requests of a call on an engine: several at once, in time, and not after the client has gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from typing import Any

from fastgpt.inference import Piece, Request, Result
from fastgpt.serve.errors import ApiError
from fastgpt.serve.link import EngineDied, Link, QueueFull, Refused
from fastgpt.serve.metrics import Metrics


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
    link: Link, requests: Sequence[Request], metrics: Metrics, timeout: float
) -> AsyncIterator[tuple[int, Piece]]:
    """Yield (request, piece) of all requests as they come. Leaving the loop cancels the rest.

    Raises:
        ApiError: the queue is full, a request cannot run, the engine ended, or the time is over.
    """
    found = asyncio.Queue[tuple[int, Piece] | Exception | None]()

    async def one(i: int, request: Request) -> None:
        try:
            with metrics.request():
                async with aclosing(link.stream(request)) as pieces:  # type: ignore[type-var]
                    start = last = time.perf_counter()
                    async for piece in pieces:
                        now = time.perf_counter()
                        metrics.token(piece, now - start if last == start else None, now - last)
                        last = now
                        found.put_nowait((i, piece))
        except (Refused, QueueFull, EngineDied) as e:
            found.put_nowait(e)
        finally:
            found.put_nowait(None)

    tasks = [asyncio.create_task(one(i, request)) for i, request in enumerate(requests)]
    end, left = time.monotonic() + timeout, len(tasks)
    try:
        while left:
            what = await asyncio.wait_for(found.get(), max(0.0, end - time.monotonic()))
            if what is None:
                left -= 1
            elif isinstance(what, Exception):
                raise error_of(what)
            else:
                yield what
    except asyncio.TimeoutError as e:
        raise error_of(e) from None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def collect(pieces: AsyncIterator[tuple[int, Piece]], count: int, gone: Callable[[], Any]) -> list[Result]:
    """Return the results of `count` requests. `gone` is asked each second whether the client has left; then the
    requests are cancelled.

    Raises:
        ApiError: as `run`; status 499 if the client has left.
    """

    async def wait() -> list[Result]:
        results: dict[int, Result] = {}
        async with aclosing(pieces) as all_pieces:  # type: ignore[type-var]
            async for i, piece in all_pieces:
                if piece.result is not None:
                    results[i] = piece.result
        return [results[i] for i in range(count)]

    task = asyncio.create_task(wait())
    try:
        while not task.done():
            await asyncio.wait([task], timeout=1.0)
            if not task.done() and await gone():
                raise ApiError(499, "the client has left")
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
