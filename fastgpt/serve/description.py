"""The description of the API at /openapi.json: the statuses of every route, and the form of its answers."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

STREAMS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
TEXT = ("/health", "/ready", "/metrics", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
OPEN = ("/health", "/ready")  # without a key
ERRORS = {
    "400": "The call is wrong; the message says where.",
    "401": "The API key is missing or wrong.",
    "404": "There is no such model.",
    "408": "The body did not arrive in time.",
    "413": "The body is too long.",
}
BUSY = {
    "429": "Too many requests wait; Retry-After says when to try again.",
    "503": "The engine ended; another one starts.",
    "504": "The request took longer than the server allows.",
}
_TEXT = {"type": "string"}
_MAYBE = {"type": ["string", "null"]}
OPENAI: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": _TEXT, "type": _TEXT, "param": _MAYBE, "code": _MAYBE},
        }
    },
}
ANTHROPIC: dict[str, Any] = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": _TEXT, "message": _TEXT},
        },
    },
}


class Api(FastAPI):
    """An application whose description has what it answers."""

    def openapi(self) -> dict[str, Any]:
        """Return the description."""
        if self.openapi_schema is None:
            for path, operations in super().openapi()["paths"].items():
                for operation in operations.values():
                    _describe(path, operation)
        assert self.openapi_schema is not None
        return self.openapi_schema


def _describe(path: str, operation: dict[str, Any]) -> None:
    """Add the statuses of a route to its description."""
    found = operation["responses"]
    found.pop("422", None)  # FastAPI's own; this server answers 400
    form = ANTHROPIC if path.startswith("/v1/messages") else OPENAI
    said = {} if path in OPEN else {**ERRORS, **(BUSY if path in STREAMS else {})}
    for status, text in said.items():
        found[status] = {"description": text, "content": {"application/json": {"schema": form}}}
    if path in STREAMS:
        found["200"]["content"]["text/event-stream"] = {}
    if path in TEXT:
        found["200"]["content"] = {"text/plain": {"schema": _TEXT}}
    if path == "/ready":
        found["503"] = {"description": "A model cannot take requests.", "content": found["200"]["content"]}
