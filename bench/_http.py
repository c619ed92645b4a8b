"""A small HTTP client over asyncio streams: one request a connection, bytes as they are, events as they come.

Cheap, so that what is measured is the server; and able to send what a proper client refuses to send.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

HEAD_BYTES = 1 << 16


@dataclass
class Answer:
    """An answer whose head has come.

    Attributes:
        status: of HTTP.
        headers: by name in lower case.
    """

    status: int
    headers: dict[str, str]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body in the parts in which it was sent.

        Raises:
            EOFError: the connection ended before the body.
        """
        if self.headers.get("transfer-encoding") != "chunked":
            yield await self.reader.readexactly(int(self.headers.get("content-length", 0)))
            return
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readexactly(2)

    async def body(self) -> bytes:
        """Return the whole body. Raises EOFError if something comes after it, or too little."""
        whole = b"".join([chunk async for chunk in self.chunks()])
        if rest := await self.reader.read(100):
            raise EOFError(f"after the answer comes {rest!r}")
        return whole

    async def events(self) -> AsyncIterator[Any]:
        """Yield the values of server-sent events; the last one is None. Raises EOFError if there is no last one."""
        left = b""
        async for chunk in self.chunks():
            *blocks, left = (left + chunk).split(b"\n\n")
            for block in blocks:
                data = block.removeprefix(b"data: ")
                yield None if data == b"[DONE]" else json.loads(data)
        if rest := await self.reader.read(100):
            raise EOFError(f"after the answer comes {rest!r}")


@asynccontextmanager
async def connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Connect to a server of this machine; the connection is closed when the block ends, whatever was not read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=HEAD_BYTES)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def request(path: str, body: Any = None, length: int | None = None) -> bytes:
    """Return the bytes of a request: POST of a body (bytes, or a value that becomes JSON), or GET without one.

    Args:
        length: says that the body has as many bytes, whatever it has.
    """
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    size = len(data) if length is None else length
    return f"{head}Content-Type: application/json\r\nContent-Length: {size}\r\n\r\n".encode() + data


@asynccontextmanager
async def asked(port: int, sent: bytes) -> AsyncIterator[Answer]:
    """Send bytes to a server, and yield its answer. Leaving the block early is what a client does that leaves.

    Raises:
        EOFError: the server closes the connection without an answer.
    """
    async with connection(port) as (reader, writer):
        writer.write(sent)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        yield Answer(int(head[0].split()[1]), headers, reader, writer)


async def get(port: int, path: str) -> tuple[int, str]:
    """Return status and text of a page."""
    async with asked(port, request(path)) as answer:
        return answer.status, (await answer.body()).decode()
