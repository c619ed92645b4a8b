"""Errors in the form of OpenAI's API: a status, and {"error": {"message", "type", "param", "code"}}. /v1/messages has
Anthropic's: {"type": "error", "error": {"type", "message"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

# https://docs.claude.com/en/api/errors; 503 has no name there
ANTHROPIC = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer other than success.

    Args:
        status: of HTTP.
        message: one sentence for the client.
        kind: of error, as OpenAI's clients know them.
        param: the field of the body that is wrong.
        code: a short name of the problem.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})

    def body(self, anthropic: bool = False) -> dict[str, Any]:
        """Return the body of the answer, in the form of OpenAI's or of Anthropic's API."""
        if anthropic:
            kind = ANTHROPIC.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self, path: str) -> JSONResponse:
        """Return the answer on a route."""
        return JSONResponse(self.body(anthropic=path.startswith("/v1/messages")), self.status, self.headers)


def of_validation(e: RequestValidationError) -> ApiError:
    """Return the answer for a body that does not fit: the field, and what is wrong with it."""
    first = e.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body" and not str(part)[:1].isupper()]
    names = [part for part in place if "[" not in part and part not in ("str", "list")]
    param = names[0] if names else None
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}")
    if first["type"] == "model_attributes_type" and not place:
        return ApiError(400, "the body is not a JSON object with Content-Type: application/json")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{'.'.join(names)} is not known, expected a parameter of this route", param=param)
    if first["type"] == "missing":
        return ApiError(400, f"{'.'.join(names)} is missing", param=param)
    said = str(first["msg"]).removeprefix("Value error, ")
    where = f"{'.'.join(names)}: " if names else ""
    return ApiError(400, f"{where}{said[:1].lower()}{said[1:]}", param=param)
