"""Lines and other separated records of a stream, with their offsets, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from re import Pattern

from fastgpt.data.read.reading import Reading


def line_blocks(reading: Reading) -> Iterator[tuple[int, list[bytes]]]:
    """Yield (offset of the first line, lines without their LF) for blocks of about a megabyte.

    A line above max_bytes is reported and left out, and so is a last line that damaged data left incomplete.
    """
    stream = reading.text_chunks()
    tail: list[bytes] = []  # pieces of a line that has not ended yet
    size = 0
    skipping = False
    at: int | None = None
    for chunk in stream:
        at = reading.first if at is None else at
        cut = chunk.find(b"\n") if size or skipping else 0
        if cut < 0:
            size += len(chunk)
            if not skipping:
                tail.append(chunk)
                if size > reading.format.max_bytes:
                    reading.giant(at, "line")
                    tail, skipping = [], True
            continue
        if skipping:
            at += size + cut + 1
            chunk, size, skipping = chunk[cut + 1 :], 0, False
        end = chunk.rfind(b"\n")
        if end < 0:
            tail.append(chunk)
            size += len(chunk)
            continue
        block = b"".join([*tail, chunk[:end]])
        yield from _checked(reading, at, block)
        at += len(block) + 1
        tail = [chunk[end + 1 :]] if end + 1 < len(chunk) else []
        size = len(chunk) - end - 1
    if tail and not reading.damaged and at is not None:
        yield from _checked(reading, at, b"".join(tail))


def _checked(reading: Reading, at: int, block: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """Yield the lines of a block; a line above max_bytes is reported and left out."""
    lines = block.split(b"\n")
    limit = reading.format.max_bytes
    if len(block) <= limit:
        yield at, lines
        return
    for line in lines:
        if len(line) > limit:
            reading.giant(at, "line")
        else:
            yield at, [line]
        at += len(line) + 1


def separated(reading: Reading, separator: Pattern[bytes], reach: int, what: str) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of what stands between the matches of a separator, which may be `reach` bytes long.

    A piece above max_bytes is reported and left out, and so is a last piece that damaged data left incomplete.

    Args:
        what: what a piece is, for messages.
    """
    limit = reading.format.max_bytes
    buffer = bytearray()
    at: int | None = None
    searched = 0
    skipping = False
    for chunk in reading.text_chunks():
        at = reading.first if at is None else at
        buffer += chunk
        begin = 0
        while (found := separator.search(buffer, max(searched, begin))) and found.end() < len(buffer):
            if not skipping:
                yield from _within(reading, at + begin, bytes(buffer[begin : found.start()]), what)
            begin, skipping = found.end(), False
        searched = found.start() if found else max(len(buffer) - reach, begin)  # a match may go on in the next chunk
        del buffer[:begin]
        at += begin
        searched -= begin
        if skipping or len(buffer) > limit:
            if not skipping:
                reading.giant(at, what, "set split to piece, paragraph or line, or raise max_bytes")
            skipping = True
            at += searched
            del buffer[:searched]
            searched = 0
    if buffer and at is not None and not skipping and not reading.damaged:
        begin = 0
        for found in separator.finditer(buffer):
            yield from _within(reading, at + begin, bytes(buffer[begin : found.start()]), what)
            begin = found.end()
        if begin < len(buffer) or not begin:
            yield from _within(reading, at + begin, bytes(buffer[begin:]), what)


def _within(reading: Reading, at: int, piece: bytes, what: str) -> Iterator[tuple[int, bytes]]:
    if len(piece) > reading.format.max_bytes:
        reading.giant(at, what, "set split to piece, paragraph or line, or raise max_bytes")
    else:
        yield at, piece
