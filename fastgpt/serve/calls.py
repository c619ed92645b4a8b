"""Calls of the API as requests of the engine, and their answers: completions and chat."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.inference import Piece, Request, Result
from fastgpt.inference.requests import bytes_of
from fastgpt.serve import answers
from fastgpt.serve.answers import REASONS, CompletionLogprobs, chat_logprob, new_id
from fastgpt.serve.errors import ApiError
from fastgpt.serve.infill import infill
from fastgpt.serve.schemas import Chat, Completion, Sampling
from fastgpt.serve.served import Served

Pieces = AsyncIterator[tuple[int, Piece]]


def requests_of(
    body: Sampling, served: Served, prompts: list[list[int]], most: int | None, **more: Any
) -> list[Request]:
    """Return n requests for each prompt, with seeds that follow one another.

    Args:
        most: the largest number of tokens to add; None: as many as fit.

    Raises:
        ApiError: a prompt is empty or, with what is to be added, longer than the context.
    """
    made, grammar = [], body.grammar()
    for number, ids in enumerate(prompts):
        if not ids:
            raise ApiError(400, "prompt is empty, expected at least one token", param="prompt")
        room = served.context - len(ids)
        wanted = most if most is not None else room
        if room < wanted or room < 0 or (most is None and room < 1):
            asked = f" and {wanted} tokens are to be added" if most else ""
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens{asked}, expected at most {served.context} in all",
                param="prompt",
                code="context_length_exceeded",
            )
        for k in range(body.n):
            seed = None if body.seed is None else (body.seed + number * body.n + k) % (1 << 63)
            values = {**body.settings(served.defaults), "max_new_tokens": wanted, "stop": body.stops, "seed": seed}
            values |= {"adapter": served.adapter, "grammar": grammar}
            try:
                made.append(Request(ids, **values, **more))
            except ValueError as e:
                raise ApiError(400, str(e).removeprefix("Request: ")) from None
    return made


def _head(id: str, kind: str, served: Served) -> dict[str, Any]:
    return {"id": id, "object": kind, "created": int(time.time()), "model": served.name}


def _usage_chunk(head: dict[str, Any], results: list[Result], n: int) -> str:
    return answers.event({**head, "choices": [], "usage": answers.usage(results, n)})


@dataclass
class CompletionCall:
    """A call of /v1/completions."""

    body: Completion
    served: Served
    id: str = field(default_factory=lambda: new_id("cmpl"))

    def requests(self) -> list[Request]:
        """Return the requests. Raises ApiError."""
        tokenizer, body = self.served.tokenizer, self.body
        if body.suffix:
            prompts = [infill(tokenizer, str(body.prompt), body.suffix)]
        else:
            prompts = [tokenizer.prompt(p) if isinstance(p, str) else p for p in body.prompts]
        more: dict[str, Any] = {} if body.logprobs is None else {"logprobs": body.logprobs}
        if body.echo and body.logprobs is not None:
            more["prompt_logprobs"] = body.logprobs
        return requests_of(body, self.served, prompts, body.max_tokens, **more)

    def answer(self, requests: list[Request], results: list[Result]) -> dict[str, Any]:
        """Return the whole answer."""
        choices = []
        for i, (request, result) in enumerate(zip(requests, results)):
            prompt = self.prompt(i) if self.body.echo else ""
            shown = None if self.body.logprobs is None else self._logprobs(request, result)
            reason = REASONS[result.finish_reason]
            choices.append({"index": i, "text": prompt + result.text, "logprobs": shown, "finish_reason": reason})
        head = _head(self.id, "text_completion", self.served)
        return {**head, "choices": choices, "usage": answers.usage(results, self.body.n)}

    def prompt(self, i: int) -> str:
        """Return the text of the prompt of request i."""
        asked = self.body.prompts[i // self.body.n]
        if isinstance(asked, str):
            return asked
        return b"".join(bytes_of(self.served.tokenizer, token) for token in asked).decode(errors="replace")

    def _logprobs(self, request: Request, result: Result) -> dict[str, Any]:
        made, n = CompletionLogprobs(self.served.tokenizer), self.body.logprobs or 0
        if self.body.echo and result.prompt_logprobs is not None and result.prompt_top_logprobs is not None:
            ids = [int(i) for i in request.prompt]
            for i, logprob, top in zip(ids, result.prompt_logprobs, result.prompt_top_logprobs):
                made.add(i, logprob, top, n)
        for token, logprob, top in zip(result.ids, result.logprobs or (), result.top_logprobs or ()):
            made.add(token, logprob, top, n)
        return made.plain()

    async def events(self, requests: list[Request], pieces: Pieces) -> AsyncIterator[str]:
        """Yield the answer as server-sent events."""
        head = _head(self.id, "text_completion", self.served)
        results: dict[int, Result] = {}
        shown = [CompletionLogprobs(self.served.tokenizer) for _ in requests]
        async for i, piece in pieces:
            logprobs, asked = None, self.body.logprobs
            if asked is not None and piece.id is not None and piece.logprob is not None:
                one = CompletionLogprobs(self.served.tokenizer, shown[i].at)
                one.add(piece.id, piece.logprob, piece.top_logprobs or (), asked)
                shown[i], logprobs = one, one.plain()
            reason = None
            if piece.result is not None:
                results[i], reason = piece.result, REASONS[piece.result.finish_reason]
            if piece.text or reason or logprobs:
                choice = {"index": i, "text": piece.text, "logprobs": logprobs, "finish_reason": reason}
                yield answers.event({**head, "choices": [choice]})
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield _usage_chunk(head, [results[i] for i in range(len(requests))], self.body.n)
        yield answers.event(None)


@dataclass
class ChatCall:
    """A call of /v1/chat/completions."""

    body: Chat
    served: Served
    id: str = field(default_factory=lambda: new_id("chatcmpl"))

    def requests(self) -> list[Request]:
        """Return the requests. Raises ApiError."""
        body, template = self.body, self.served.template
        more: dict[str, Any] = {"logprobs": body.top_logprobs or 0} if body.logprobs else {}
        found = requests_of(body, self.served, [self.prompt()], body.most, **more)
        return [_with_stop(request, template.stop, self.served) for request in found]

    def prompt(self) -> list[int]:
        """Return the ids of the messages. Raises ApiError."""
        body, served = self.body, self.served
        messages = [message.plain for message in body.messages]
        for message in messages:
            special = next((s for s in served.tokenizer.specials if s in message["content"]), None)
            if special is not None:
                raise ApiError(
                    400, f"a message contains {special}, expected text without special tokens", param="messages"
                )
        template = served.template
        try:
            if body.continue_final_message:
                text = template.render_open(messages)
            else:
                text = template.render(messages, ask=body.add_generation_prompt is not False)
        except UserError as e:
            raise ApiError(400, str(e), param="messages") from None
        prefix = served.tokenizer.prefix if template.default else ()  # another template writes its bos_token
        return [*prefix, *(int(i) for i in served.tokenizer.encode(text, specials=True))]

    def answer(self, requests: list[Request], results: list[Result]) -> dict[str, Any]:
        """Return the whole answer."""
        choices = []
        for i, result in enumerate(results):
            logprobs = None
            if self.body.logprobs:
                values = zip(result.ids, result.logprobs or (), result.top_logprobs or ())
                logprobs = {"content": [chat_logprob(self.served.tokenizer, *value) for value in values]}
            message = {"role": "assistant", "content": result.text}
            reason = REASONS[result.finish_reason]
            choices.append({"index": i, "message": message, "logprobs": logprobs, "finish_reason": reason})
        head = _head(self.id, "chat.completion", self.served)
        return {**head, "choices": choices, "usage": answers.usage(results, self.body.n)}

    async def events(self, requests: list[Request], pieces: Pieces) -> AsyncIterator[str]:
        """Yield the answer as server-sent events."""
        head = _head(self.id, "chat.completion.chunk", self.served)
        results: dict[int, Result] = {}
        for i in range(len(requests)):
            first = {"index": i, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            yield answers.event({**head, "choices": [first]})
        async for i, piece in pieces:
            logprobs = None
            if piece.id is not None and piece.logprob is not None:
                values = (piece.id, piece.logprob, piece.top_logprobs or ())
                logprobs = {"content": [chat_logprob(self.served.tokenizer, *values)]}
            if piece.text or logprobs:
                delta = {"content": piece.text}
                choice = {"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": None}
                yield answers.event({**head, "choices": [choice]})
            if piece.result is not None:
                results[i] = piece.result
                last = {"index": i, "delta": {}, "finish_reason": REASONS[piece.result.finish_reason]}
                yield answers.event({**head, "choices": [last]})
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield _usage_chunk(head, [results[i] for i in range(len(requests))], self.body.n)
        yield answers.event(None)


def _with_stop(request: Request, stop: str, served: Served) -> Request:
    """Return the request, which also ends where the template ends a reply. A grammar says itself where it ends, except
    that a special token is no part of its text."""
    ends = stop and (request.grammar is None or stop in served.tokenizer.specials)
    return replace(request, stop=[*request.stop, stop]) if ends else request
