"""The HTTP application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from fastgpt._version import __version__
from fastgpt.serve.adapters import add_adapters
from fastgpt.serve.description import Api
from fastgpt.serve.errors import ApiError, of_validation
from fastgpt.serve.guard import Guard, Limits
from fastgpt.serve.routes import Server, add_generation, add_overview, add_tokenizer
from fastgpt.serve.served import Served

Part = Callable[[FastAPI, Server], None]


def build_app(
    models: dict[str, Served], limits: Limits, adapters: Path | None = None, parts: Sequence[Part] = ()
) -> FastAPI:
    """Return the application.

    Args:
        models: by name; the first one answers requests that name none. Roll-outs and adapters change it.
        adapters: folder from which clients may load adapters; None: they may not.
        parts: what else the server does; each adds its routes, observers and background work.
    """
    server = Server(models, limits.timeout)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(work()) for work in server.background]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for served in models.values():
            await asyncio.to_thread(served.link.close)

    app = Api(title="fastgpt", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, limits=limits, metrics=server.metrics)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _plain_error)
    add_generation(app, server)
    add_tokenizer(app, server)
    add_overview(app, server)
    if adapters is not None:
        add_adapters(app, server, adapters)
    for add in parts:
        add(app, server)
    return app


async def _refused(request: Request, e: Exception) -> Response:
    assert isinstance(e, ApiError)
    return e.response(request.url.path)


async def _invalid(request: Request, e: Exception) -> Response:
    assert isinstance(e, RequestValidationError)
    return of_validation(e).response(request.url.path)


async def _plain_error(request: Request, e: Exception) -> Response:
    assert isinstance(e, HTTPException)
    message = f"{request.method} {request.url.path}: {str(e.detail).lower()}"
    return ApiError(e.status_code, message, headers=e.headers).response(request.url.path)
