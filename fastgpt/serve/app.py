"""The HTTP application: routes, keys, limits and errors."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from fastgpt._version import __version__
from fastgpt.inference.chat import FILE
from fastgpt.serve import answers
from fastgpt.serve.calls import ChatCall, CompletionCall
from fastgpt.serve.errors import ApiError, of_validation
from fastgpt.serve.messages import Messages, MessagesCall
from fastgpt.serve.metrics import Metrics
from fastgpt.serve.page import page
from fastgpt.serve.responses import Responses, ResponsesCall
from fastgpt.serve.running import collect, run
from fastgpt.serve.schemas import Chat, Completion, Detokenize, Tokenize
from fastgpt.serve.served import Served

log = logging.getLogger("fastgpt")
Call = CompletionCall | ChatCall | ResponsesCall | MessagesCall
OPEN = ("/", "/health", "/ready")  # answered without a key


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        body: largest body of a request, in bytes.
        timeout: seconds after which a request is cancelled.
        keys: keys of which a client must send one; none: no key is needed.
    """

    body: int = 1 << 22
    timeout: float = 600.0
    keys: tuple[str, ...] = field(default=(), repr=False)


def build_app(models: Mapping[str, Served], limits: Limits) -> FastAPI:
    """Return the application. The first model answers requests that name none."""
    metrics = Metrics()

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        for served in models.values():
            await asyncio.to_thread(served.link.close)

    app = FastAPI(title="fastgpt", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, limits=limits, metrics=metrics)
    app.add_exception_handler(ApiError, lambda request, e: e.response(request.url.path))  # type: ignore[attr-defined]
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _plain_error)

    def find(name: str | None) -> Served:
        if name is None:
            return next(iter(models.values()))
        if name not in models:
            known = ", ".join(models)
            raise ApiError(
                404, f"there is no model {name[:200]!r}, expected one of {known}", param="model", code="model_not_found"
            )
        return models[name]

    async def answer(call: Call, request: Request) -> Response:
        requests = call.requests()
        pieces = run(call.served.link, requests, metrics, limits.timeout)
        if not call.body.stream:
            return JSONResponse(call.answer(requests, await collect(pieces, len(requests), request.is_disconnected)))
        # the first piece comes before the headers, so that a full queue is still status 429
        first = await anext(pieces)
        return StreamingResponse(_events(call, requests, _again(first, pieces)), media_type="text/event-stream")

    @app.post("/v1/completions")
    async def completions(body: Completion, request: Request) -> Response:
        return await answer(CompletionCall(body, find(body.model)), request)

    @app.post("/v1/chat/completions")
    async def chat(body: Chat, request: Request) -> Response:
        return await answer(ChatCall(body, find(body.model)), request)

    @app.post("/v1/responses")
    async def responses(body: Responses, request: Request) -> Response:
        return await answer(ResponsesCall(body, find(body.model)), request)

    @app.post("/v1/messages")
    async def messages(body: Messages, request: Request) -> Response:
        return await answer(MessagesCall(body, find(body.model)), request)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_about(served) for served in models.values()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return _about(find(name))

    @app.post("/tokenize")
    async def tokenize(body: Tokenize) -> dict[str, Any]:
        served = find(body.model)
        prefix = served.tokenizer.prefix if body.add_special_tokens else ()
        tokens = [*prefix, *served.tokenizer.encode(body.prompt, specials=True).tolist()]
        return {"tokens": tokens, "count": len(tokens), "max_model_len": served.context}

    @app.get("/tokenizer_info")
    async def tokenizer_info(model: str | None = None) -> dict[str, Any]:
        tokenizer = find(model).tokenizer
        marks = {"eos_token": tokenizer.decode_bytes([tokenizer.eot]).decode(), "bos_token": tokenizer.bos or None}
        return {**marks, "pad_token": None, "chat_template": tokenizer.companions.get(FILE)}

    @app.post("/detokenize")
    async def detokenize(body: Detokenize) -> dict[str, Any]:
        tokenizer = find(body.model).tokenizer
        wrong = next((i for i in body.tokens if i >= tokenizer.n_vocab), None)
        if wrong is not None:
            raise ApiError(400, f"tokens has {wrong}, expected 0 to {tokenizer.n_vocab - 1}", param="tokens")
        return {"prompt": tokenizer.decode_bytes(body.tokens).decode(errors="replace")}

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return page()

    @app.get("/health")
    async def health() -> Response:
        """Answer while the server runs."""
        return PlainTextResponse("ok")

    @app.get("/ready")
    async def ready() -> Response:
        """Answer 200 while every model can take requests."""
        down = [name for name, served in models.items() if not served.link.alive]
        return PlainTextResponse(f"not ready: {', '.join(down)}" if down else "ok", 503 if down else 200)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        metrics.restarts.set(sum(served.link.restarts for served in models.values()))
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


async def _invalid(request: Request, e: Exception) -> Response:
    assert isinstance(e, RequestValidationError)
    return of_validation(e).response(request.url.path)


async def _plain_error(request: Request, e: Exception) -> Response:
    assert isinstance(e, HTTPException)
    message = f"{request.method} {request.url.path}: {str(e.detail).lower()}"
    return ApiError(e.status_code, message, headers=e.headers).response(request.url.path)


def _about(served: Served) -> dict[str, Any]:
    about = {"id": served.name, "object": "model", "created": served.created, "owned_by": "fastgpt"}
    return {**about, "max_model_len": served.context}


async def _again(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async with aclosing(rest):  # type: ignore[type-var]
        yield first
        async for one in rest:
            yield one


async def _events(call: Call, requests: list[Any], pieces: AsyncIterator[Any]) -> AsyncIterator[str]:
    """Yield the events of a call; an error after the headers is an event, too."""
    async with aclosing(pieces):  # type: ignore[type-var]
        try:
            async for text in call.events(requests, pieces):
                yield text
        except ApiError as e:
            yield answers.event(e.body())


class Guard:
    """Check key and size of each request, and count the answers. Plain ASGI, so that streams pass untouched."""

    def __init__(self, app: Any, limits: Limits, metrics: Metrics) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        seen = False

        async def counted(message: Any) -> None:
            nonlocal seen
            if message["type"] == "http.response.start" and not seen:
                seen = True
                route = getattr(scope.get("route"), "path", "other")
                self.metrics.answers.labels(route, str(message["status"])).inc()
            await send(message)

        headers = {name.lower(): value for name, value in scope["headers"]}
        try:
            self._check(scope["path"], headers)
            await self.app(scope, await self._read(receive), counted)
        except ApiError as e:
            if not seen:
                await e.response(scope["path"])(scope, receive, counted)

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Raise ApiError for a missing key or a body that says it is too long."""
        if self.limits.keys and path not in OPEN:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            given = key if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
            known = [hmac.compare_digest(given, one.encode()) for one in self.limits.keys]
            if not any(known):
                raise ApiError(401, "the API key is missing or wrong, expected `Authorization: Bearer KEY`",
                               kind="authentication_error", code="invalid_api_key",
                               headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.limits.body:
            raise self._too_long()

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the body is too long, expected at most {self.limits.body:,} bytes")

    async def _read(self, receive: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
        """Read the body, and return a `receive` that gives it in one piece; FastAPI would make its own error of one
        that is raised while it reads."""
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > self.limits.body:
                raise self._too_long()
        pending: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return pending.pop() if pending else await receive()

        return replay
