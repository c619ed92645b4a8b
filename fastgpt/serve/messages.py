"""/v1/messages: Anthropic's Messages API for text, as a chat."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fastgpt.inference import Request, Result
from fastgpt.inference.requests import bytes_of
from fastgpt.serve.answers import new_id
from fastgpt.serve.calls import ChatCall, Pieces
from fastgpt.serve.errors import ApiError
from fastgpt.serve.schemas import Chat, Part
from fastgpt.serve.served import Served
from fastgpt.serve.strict import Strict
from fastgpt.serve.structured import NamelessSchema


def as_blocks(content: Any) -> Any:
    """Return a text as a list of one block, so that an error names the place in the list."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class CacheControl(Strict):
    """Accepted, and without effect: what prompts begin with in common is kept anyway, as long as there is room."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Block(Part):
    cache_control: CacheControl | None = None


Blocks = Annotated[list[Block], BeforeValidator(as_blocks)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class Turn(Strict):
    role: Literal["user", "assistant"]
    content: Blocks


class Metadata(Strict):
    user_id: str | None = Field(None, max_length=512)


class Disabled(Strict):
    type: Literal["disabled"]


class OutputConfig(Strict):
    format: NamelessSchema | None = None


class CountTokens(Strict):
    """Body of /v1/messages/count_tokens. Settings that change nothing at their default are accepted."""

    model: str | None = None
    messages: Annotated[list[Turn], Field(min_length=1)]
    system: Blocks | None = None
    cache_control: CacheControl | None = None
    output_config: OutputConfig | None = None
    thinking: Disabled | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None

    def chat(self, **more: Any) -> Chat:
        """Return it as a body of /v1/chat/completions; a last message of the assistant is to be continued."""
        head = [{"role": "system", "content": _parts(self.system)}] if self.system else []
        turns = [{"role": turn.role, "content": _parts(turn.content)} for turn in self.messages]
        last = self.messages[-1].role == "assistant"
        return Chat.model_validate({**more, "messages": [*head, *turns], "continue_final_message": last})


class Messages(CountTokens):
    """Body of /v1/messages."""

    max_tokens: int = Field(ge=1)
    stop_sequences: Annotated[list[Stop], Field(max_length=16)] = []
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    stream: bool = False
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    def chat(self, **more: Any) -> Chat:
        """Return it as a body of /v1/chat/completions."""
        values = {name: getattr(self, name) for name in ("max_tokens", "temperature", "top_p", "top_k")}
        schema = self.output_config.format.schema_ if self.output_config and self.output_config.format else None
        if schema is not None:
            values["structured_outputs"] = {"json": schema}
        return super().chat(**values, stop=self.stop_sequences or None, **more)


@dataclass
class MessagesCall:
    """A call of /v1/messages."""

    body: Messages
    served: Served
    id: str = field(default_factory=lambda: new_id("msg"))

    def requests(self) -> list[Request]:
        """Return the request. Raises ApiError."""
        return ChatCall(self.body.chat(), self.served).requests()

    def answer(self, requests: list[Request], results: list[Result]) -> dict[str, Any]:
        """Return the whole answer."""
        (result,) = results
        content = [_block(result.text)]
        return {**self._head(), "content": content, **self._end(result), "usage": _usage(result)}

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
                    end = self._end(piece.result)
                    yield _event("message_delta", delta=end, usage=_usage(piece.result))
                    yield _event("message_stop")
        except ApiError as e:
            yield _event("error", error=e.body(anthropic=True)["error"])

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.served.name}

    def _end(self, result: Result) -> dict[str, str | None]:
        """Return why the message ends. Only a stop string of the client is a stop_sequence, not the template's."""
        if result.finish_reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if result.finish_reason == "content_filter":
            return {"stop_reason": "refusal", "stop_sequence": None}
        if result.finish_reason == "stop":
            whole = b"".join(bytes_of(self.served.tokenizer, i) for i in result.ids)
            rest = whole[len(result.text.encode()) :].decode(errors="replace")
            found = next((s for s in self.body.stop_sequences if rest.startswith(s)), None)
            if found is not None:
                return {"stop_reason": "stop_sequence", "stop_sequence": found}
        return {"stop_reason": "end_turn", "stop_sequence": None}


def _parts(blocks: list[Block]) -> list[dict[str, str]]:
    return [_block(block.text) for block in blocks]


def _usage(result: Result) -> dict[str, int]:
    """Return the tokens of a message; `input_tokens` are those that were read, without those of the cache."""
    cached = result.cached_tokens
    read = {"input_tokens": result.prompt_tokens - cached, "cache_read_input_tokens": cached}
    return {**read, "cache_creation_input_tokens": 0, "output_tokens": len(result.ids)}


def _block(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _event(kind: str, **fields: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields}, ensure_ascii=False)}\n\n"
