"""Results of the engine in the form of OpenAI's API."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

from fastgpt.data import Tokenizer
from fastgpt.inference import Result
from fastgpt.inference.requests import bytes_of

encode = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make an encoder for every token
REASONS = {"length": "length", "stop": "stop", "eos": "stop", "content_filter": "content_filter"}


def new_id(prefix: str) -> str:
    """Return an id that no other answer has."""
    return f"{prefix}-{secrets.token_hex(12)}"


def event(value: Any) -> str:
    """Return a server-sent event; None ends the stream."""
    return f"data: {'[DONE]' if value is None else encode(value)}\n\n"


def usage(results: Sequence[Result], n: int = 1) -> dict[str, Any]:
    """Return the tokens of prompts, each of which has n results, and of what was added."""
    prompt, new = sum(r.prompt_tokens for r in results[::n]), sum(len(r.ids) for r in results)
    cached = {"cached_tokens": sum(r.cached_tokens for r in results[::n])}
    total = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    return {**total, "prompt_tokens_details": cached}


def text_of(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of a token; bytes that are no character show as \\ufffd."""
    return bytes_of(tokenizer, token).decode(errors="replace")


class CompletionLogprobs:
    """The `logprobs` of a completion, built token by token."""

    def __init__(self, tokenizer: Tokenizer, at: int = 0) -> None:
        self.tokenizer, self.at = tokenizer, at
        self.tokens: list[str] = []
        self.values: list[float | None] = []
        self.top: list[dict[str, float] | None] = []
        self.offsets: list[int] = []

    def add(self, token: int, logprob: float | None, top: Sequence[tuple[int, float]], n: int) -> None:
        """Add a token with its log-probability (None: it is the first of a text) and the n most likely ones."""
        text = text_of(self.tokenizer, token)
        self.tokens.append(text)
        self.values.append(logprob)
        self.offsets.append(self.at)
        self.at += len(text)
        if logprob is None:
            self.top.append(None)
            return
        found: dict[str, float] = {}
        for other, value in top[:n]:
            found.setdefault(text_of(self.tokenizer, other), value)  # two tokens may show as the same text
        self.top.append(found)

    def plain(self) -> dict[str, Any]:
        """Return it as JSON values."""
        named = {"tokens": self.tokens, "token_logprobs": self.values}
        return {**named, "top_logprobs": self.top, "text_offset": self.offsets}


def chat_logprob(tokenizer: Tokenizer, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Return the log-probability of a token of a chat, with its alternatives."""

    def one(token: int, value: float) -> dict[str, Any]:
        return {"token": text_of(tokenizer, token), "logprob": value, "bytes": list(bytes_of(tokenizer, token))}

    return {**one(token, logprob), "top_logprobs": [one(*pair) for pair in top]}
