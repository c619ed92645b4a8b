"""What stands before every route: keys, the size of bodies, and a count of the answers."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio

from fastgpt.serve.errors import ApiError
from fastgpt.serve.metrics import Metrics

OPEN = ("/", "/health", "/ready")  # answered without a key


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        body: largest body of a request, in bytes.
        timeout: seconds after which a request is cancelled.
        keys: keys of which a client must send one; none: no key is needed.
        upload: seconds in which the body of a request must arrive.
    """

    body: int = 1 << 22
    timeout: float = 600.0
    keys: tuple[str, ...] = field(default=(), repr=False)
    upload: float = 60.0


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
        body, more = bytearray(), True
        with anyio.move_on_after(self.limits.upload) as scope:
            while more:
                message = await receive()
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > self.limits.body:
                    raise self._too_long()
        if scope.cancelled_caught:
            said = f"the body did not arrive within {self.limits.upload:g} seconds"
            raise ApiError(408, said, kind="timeout_error")
        pending: list[Any] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Any:
            return pending.pop() if pending else await receive()

        return replay
