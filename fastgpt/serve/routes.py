"""The routes of a server: what generates, the tokenizer, and what a monitor asks."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from fastgpt.inference import Piece, Result
from fastgpt.inference.chat import FILE
from fastgpt.serve import answers
from fastgpt.serve.calls import ChatCall, CompletionCall
from fastgpt.serve.errors import ApiError
from fastgpt.serve.messages import CountTokens, Messages, MessagesCall
from fastgpt.serve.metrics import Metrics
from fastgpt.serve.page import page
from fastgpt.serve.responses import Responses, ResponsesCall
from fastgpt.serve.running import SECONDS_TO_SAY, EventStream, collect, run, while_here
from fastgpt.serve.schemas import Chat, Completion, Detokenize, Tokenize
from fastgpt.serve.served import Served
from fastgpt.serve.structured import GrammarCheck
from fastgpt.serve.watch.watcher import Watcher

Call = CompletionCall | ChatCall | ResponsesCall | MessagesCall


@dataclass(frozen=True)
class Answered:
    """A call that was answered.

    Attributes:
        call: what was asked, and of which model.
        results: of its requests.
        first, seconds: time to the first token, and to the last one, from the start of the call.
    """

    call: Call
    results: list[Result]
    first: float
    seconds: float


@dataclass
class Server:
    """What the routes answer with.

    Attributes:
        models: by name; the first one answers requests that name none.
        timeout: seconds after which a request is cancelled.
        metrics: counters.
        check_grammars: refuses those that cannot be compiled.
        watcher: sees every piece before the client does; None: nobody does.
        feedback: whether thumbs are kept, so that the page shows them.
        observers: called with what each answered call was, and what came of it.
        background: run while the server does.
    """

    models: dict[str, Served]
    timeout: float
    metrics: Metrics = field(default_factory=Metrics)
    check_grammars: GrammarCheck = field(default_factory=GrammarCheck)
    watcher: Watcher | None = None
    feedback: bool = False
    observers: list[Callable[[Answered], None]] = field(default_factory=list)
    background: list[Callable[[], Coroutine[Any, Any, None]]] = field(default_factory=list)

    def find(self, name: str | None) -> Served:
        """Return a model. Raises ApiError if there is none of this name."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            known = ", ".join(self.models)
            said = f"there is no model {name[:200]!r}, expected one of {known}"
            raise ApiError(404, said, param="model", code="model_not_found")
        return self.models[name]

    async def answer(self, call: Call, request: Request) -> Response:
        """Run a call; the answer comes whole or as a stream, as its body says."""
        with call.served.hold():
            requests = call.requests()
            await self.check_grammars(requests, call.served.tokenizer)
            pieces = run(call.served.link, requests, self.metrics, self.timeout)
            if self.watcher is not None:
                pieces = self.watcher.seen(call, requests, pieces)
            pieces = self._observed(call, pieces)
            if not call.body.stream:
                results = await while_here(collect(pieces, len(requests)), request)
                return JSONResponse(call.answer(requests, results))
            # the first piece comes before the headers, so that a full queue is still status 429
            first = await while_here(anext(pieces), request)
        return EventStream(_events(call, requests, _again(first, pieces)), self.timeout + SECONDS_TO_SAY)

    async def _observed(self, call: Call, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[tuple[int, Piece]]:
        """Yield pieces, and tell the observers when the last one has come; a call that ends early is not told."""
        start, first = time.perf_counter(), None
        results: dict[int, Result] = {}
        async with aclosing(pieces):  # type: ignore[type-var]
            async for i, piece in pieces:
                first = time.perf_counter() - start if first is None else first
                if piece.result is not None:
                    results[i] = piece.result
                yield i, piece
        done = Answered(call, [results[i] for i in sorted(results)], first or 0.0, time.perf_counter() - start)
        for observe in self.observers:
            observe(done)


def add_generation(app: FastAPI, server: Server) -> None:
    """Add the routes that generate."""

    @app.post("/v1/completions")
    async def completions(body: Completion, request: Request) -> Response:
        return await server.answer(CompletionCall(body, server.find(body.model)), request)

    @app.post("/v1/chat/completions")
    async def chat(body: Chat, request: Request) -> Response:
        return await server.answer(ChatCall(body, server.find(body.model)), request)

    @app.post("/v1/responses")
    async def responses(body: Responses, request: Request) -> Response:
        return await server.answer(ResponsesCall(body, server.find(body.model)), request)

    @app.post("/v1/messages")
    async def messages(body: Messages, request: Request) -> Response:
        return await server.answer(MessagesCall(body, server.find(body.model)), request)

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountTokens) -> dict[str, int]:
        return {"input_tokens": len(ChatCall(body.chat(), server.find(body.model)).prompt())}


def add_tokenizer(app: FastAPI, server: Server) -> None:
    """Add the routes of the tokenizer."""

    @app.post("/tokenize")
    async def tokenize(body: Tokenize) -> dict[str, Any]:
        served = server.find(body.model)
        prefix = served.tokenizer.prefix if body.add_special_tokens else ()
        tokens = [*prefix, *served.tokenizer.encode(body.prompt, specials=True).tolist()]
        return {"tokens": tokens, "count": len(tokens), "max_model_len": served.context}

    @app.get("/tokenizer_info")
    async def tokenizer_info(model: str | None = None) -> dict[str, Any]:
        tokenizer = server.find(model).tokenizer
        marks = {"eos_token": tokenizer.decode_bytes([tokenizer.eot]).decode(), "bos_token": tokenizer.bos or None}
        return {**marks, "pad_token": None, "chat_template": tokenizer.companions.get(FILE)}

    @app.post("/detokenize")
    async def detokenize(body: Detokenize) -> dict[str, Any]:
        tokenizer = server.find(body.model).tokenizer
        wrong = next((i for i in body.tokens if i >= tokenizer.n_vocab), None)
        if wrong is not None:
            raise ApiError(400, f"tokens has {wrong}, expected 0 to {tokenizer.n_vocab - 1}", param="tokens")
        return {"prompt": tokenizer.decode_bytes(body.tokens).decode(errors="replace")}


def add_overview(app: FastAPI, server: Server) -> None:
    """Add the chat page, the list of models, and what a monitor asks."""

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return page(server.feedback)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_about(served) for served in server.models.values()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return _about(server.find(name))

    @app.get("/health")
    async def health() -> Response:
        """Answer while the server runs."""
        return PlainTextResponse("ok")

    @app.get("/ready")
    async def ready() -> Response:
        """Answer 200 while every model can take requests."""
        down = [name for name, served in server.models.items() if not served.link.alive]
        return PlainTextResponse(f"not ready: {', '.join(down)}" if down else "ok", 503 if down else 200)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        server.metrics.restarts.set(sum(link.restarts for link in {served.link for served in server.models.values()}))
        for name, served in server.models.items():
            for state, count in served.link.load.pages.items():
                server.metrics.pages.labels(name, state).set(count)
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _about(served: Served) -> dict[str, Any]:
    about = {"id": served.name, "object": "model", "created": served.created, "owned_by": "fastgpt"}
    version = {} if served.version is None else {"version": served.version}
    root = {"root": served.root, "parent": served.parent}
    return {**about, **root, **version, "max_model_len": served.context}


async def _again(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async with aclosing(rest):  # type: ignore[type-var]
        yield first
        async for one in rest:
            yield one


async def _events(call: Call, requests: list[Any], pieces: AsyncIterator[Any]) -> AsyncGenerator[str, None]:
    """Yield the events of a call; an error after the headers is an event, too."""
    async with aclosing(pieces):  # type: ignore[type-var]
        try:
            async for text in call.events(requests, pieces):
                yield text
        except ApiError as e:
            yield answers.event(e.body())
