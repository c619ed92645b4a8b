"""/v1/responses: OpenAI's Responses API for text, as a chat. Nothing is stored."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fastgpt.inference import Request, Result
from fastgpt.serve.answers import new_id
from fastgpt.serve.calls import ChatCall, Pieces
from fastgpt.serve.errors import ApiError
from fastgpt.serve.schemas import Chat, Text
from fastgpt.serve.served import Served
from fastgpt.serve.strict import Strict
from fastgpt.serve.structured import FlatFormat, as_chat_format


def as_parts(content: Any) -> Any:
    """Return a text as a list of one part, so that an error names the place in the list."""
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


def as_items(input: Any) -> Any:
    """Return a text as a list of one message of the user."""
    return [{"role": "user", "content": input}] if isinstance(input, str) else input


Nothing = Annotated[list[Any], Field(max_length=0)] | None


class ItemPart(Strict):
    type: Literal["input_text", "output_text"]
    text: Text
    annotations: Nothing = None
    logprobs: Nothing = None


class Item(Strict):
    """A message; one that an earlier answer had comes with its id and status."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[ItemPart], BeforeValidator(as_parts)]
    id: str | None = None
    status: Literal["completed", "incomplete"] | None = None

    def message(self) -> dict[str, str]:
        """Return it as a message of a chat."""
        return {"role": self.role, "content": "".join(part.text for part in self.content)}


class TextOptions(Strict):
    format: FlatFormat | None = None


class Responses(Strict):
    """Body of /v1/responses. Settings of OpenAI's API that change nothing at their default are accepted."""

    model: str | None = None
    input: Annotated[list[Item], Field(min_length=1), BeforeValidator(as_items)]
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    stream: bool = False
    metadata: dict[str, str] | None = None
    user: str | None = Field(None, max_length=512)
    safety_identifier: str | None = Field(None, max_length=512)
    store: Literal[False] | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    text: TextOptions | None = None
    tools: Nothing = None
    include: Nothing = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Literal[0] | None = None

    def chat(self) -> Chat:
        """Return it as a body of /v1/chat/completions."""
        head = [{"role": "system", "content": self.instructions}] if self.instructions else []
        values: dict[str, Any] = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}
        messages = [*head, *(item.message() for item in self.input)]
        if self.text is not None and self.text.format is not None:
            values["response_format"] = as_chat_format(self.text.format)
        return Chat.model_validate({**values, "messages": messages, "max_tokens": self.max_output_tokens})


@dataclass
class ResponsesCall:
    """A call of /v1/responses."""

    body: Responses
    served: Served
    id: str = field(default_factory=lambda: new_id("resp"))
    item: str = field(default_factory=lambda: new_id("msg"))
    created: int = field(default_factory=lambda: int(time.time()))

    def requests(self) -> list[Request]:
        """Return the request. Raises ApiError."""
        return ChatCall(self.body.chat(), self.served).requests()

    def answer(self, requests: list[Request], results: list[Result]) -> dict[str, Any]:
        """Return the whole answer."""
        (result,) = results
        why = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(result.finish_reason)
        status = "incomplete" if why else "completed"
        new = len(result.ids)
        usage = {
            "input_tokens": result.prompt_tokens,
            "input_tokens_details": {"cached_tokens": result.cached_tokens},
            "output_tokens": new,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": result.prompt_tokens + new,
        }
        details = {"reason": why} if why else None
        made = {"status": status, "incomplete_details": details, "output": [self._message(status, result.text)]}
        return {**self._head(requests[0]), **made, "usage": usage}

    async def events(self, requests: list[Request], pieces: Pieces) -> AsyncIterator[str]:
        """Yield the answer as server-sent events; an error after the first one is an event, too."""
        number = 0

        def event(kind: str, **fields: Any) -> str:
            nonlocal number
            value = {"type": kind, "sequence_number": number, **fields}
            number += 1
            return f"event: {kind}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n"

        item, part = {"output_index": 0}, {"item_id": self.item, "output_index": 0, "content_index": 0}
        yield event("response.created", response=self._head(requests[0]))
        yield event("response.in_progress", response=self._head(requests[0]))
        yield event("response.output_item.added", **item, item=self._message("in_progress", None))
        yield event("response.content_part.added", **part, part=_part(""))
        try:
            async for _, piece in pieces:
                if piece.text:
                    yield event("response.output_text.delta", **part, delta=piece.text, logprobs=[])
                if piece.result is not None:
                    whole = self.answer(requests, [piece.result])
                    text = piece.result.text
                    yield event("response.output_text.done", **part, text=text, logprobs=[])
                    yield event("response.content_part.done", **part, part=_part(text))
                    yield event("response.output_item.done", **item, item=whole["output"][0])
                    yield event(f"response.{whole['status']}", response=whole)
        except ApiError as e:
            yield event("error", code=e.code or e.kind, message=e.message, param=e.param)

    def _head(self, request: Request) -> dict[str, Any]:
        """Return the answer before there is a token."""
        body = self.body
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.served.name,
            "output": [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": {"format": self._format()},
            "tool_choice": body.tool_choice or "auto",
            "tools": [],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }

    def _format(self) -> dict[str, Any]:
        given = None if self.body.text is None else self.body.text.format
        return {"type": "text"} if given is None else given.model_dump(by_alias=True, exclude_unset=True)

    def _message(self, status: str, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [_part(text)]
        return {"id": self.item, "type": "message", "status": status, "role": "assistant", "content": content}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
