"""/v1/messages: Anthropic's Messages API for text, as a chat."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fastgpt.inference import Request, Result
from fastgpt.inference.requests import bytes_of
from fastgpt.serve.answers import new_id
from fastgpt.serve.calls import ChatCall, Pieces
from fastgpt.serve.errors import ApiError
from fastgpt.serve.schemas import Chat, Part, Strict
from fastgpt.serve.served import Served


def as_blocks(content: Any) -> Any:
    """Return a text as a list of one block, so that an error names the place in the list."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Blocks = Annotated[list[Part], BeforeValidator(as_blocks)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class Turn(Strict):
    role: Literal["user", "assistant"]
    content: Blocks


class Metadata(Strict):
    user_id: str | None = Field(None, max_length=512)


class Disabled(Strict):
    type: Literal["disabled"]


class Messages(Strict):
    """Body of /v1/messages. Settings of Anthropic's API that change nothing at their default are accepted."""

    model: str | None = None
    messages: Annotated[list[Turn], Field(min_length=1)]
    max_tokens: int = Field(ge=1)
    system: Blocks | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=16)] = []
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    stream: bool = False
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    thinking: Disabled | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None

    def chat(self) -> Chat:
        """Return it as a body of /v1/chat/completions."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        turns = [{"role": turn.role, "content": turn.content} for turn in self.messages]
        values = {name: getattr(self, name) for name in ("max_tokens", "temperature", "top_p", "top_k")}
        return Chat.model_validate({**values, "messages": [*head, *turns], "stop": self.stop_sequences or None})


@dataclass
class MessagesCall:
    """A call of /v1/messages."""

    body: Messages
    served: Served

    def requests(self) -> list[Request]:
        """Return the request. Raises ApiError."""
        if self.body.messages[-1].role == "assistant":
            raise ApiError(
                400, "messages ends with the assistant, which this server cannot continue, expected the user"
            )
        return ChatCall(self.body.chat(), self.served).requests()

    def answer(self, requests: list[Request], results: list[Result]) -> dict[str, Any]:
        """Return the whole answer."""
        (result,) = results
        usage = {"input_tokens": result.prompt_tokens, "output_tokens": len(result.ids)}
        return {**self._head(), "content": [_block(result.text)], **self._end(result), "usage": usage}

    async def events(self, requests: list[Request], pieces: Pieces) -> AsyncIterator[str]:
        """Yield the answer as server-sent events; an error after the first one is an event, too."""
        usage = {"input_tokens": len(requests[0].prompt), "output_tokens": 0}
        message = {**self._head(), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        yield _event("message_start", message=message)
        yield _event("content_block_start", index=0, content_block=_block(""))
        try:
            async for _, piece in pieces:
                if piece.text:
                    yield _event("content_block_delta", index=0, delta={"type": "text_delta", "text": piece.text})
                if piece.result is not None:
                    yield _event("content_block_stop", index=0)
                    new = {"output_tokens": len(piece.result.ids)}
                    yield _event("message_delta", delta=self._end(piece.result), usage=new)
                    yield _event("message_stop")
        except ApiError as e:
            yield _event("error", error=e.body(anthropic=True)["error"])

    def _head(self) -> dict[str, Any]:
        return {"id": new_id("msg"), "type": "message", "role": "assistant", "model": self.served.name}

    def _end(self, result: Result) -> dict[str, str | None]:
        """Return why the message ends. Only a stop string of the client is a stop_sequence, not the template's."""
        if result.finish_reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if result.finish_reason == "stop":
            whole = b"".join(bytes_of(self.served.tokenizer, i) for i in result.ids)
            rest = whole[len(result.text.encode()) :].decode(errors="replace")
            found = next((s for s in self.body.stop_sequences if rest.startswith(s)), None)
            if found is not None:
                return {"stop_reason": "stop_sequence", "stop_sequence": found}
        return {"stop_reason": "end_turn", "stop_sequence": None}


def _block(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _event(kind: str, **fields: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields}, ensure_ascii=False)}\n\n"
