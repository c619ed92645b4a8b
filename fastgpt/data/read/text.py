"""Text and markdown: whole files, or what stands between marks, paragraphs, lines, or pieces of a size."""

from __future__ import annotations

import re
from collections.abc import Iterator

from fastgpt.data.document import Document
from fastgpt.data.read.lines import line_blocks, separated
from fastgpt.data.read.reading import Reading

END_OF_TEXT = b"<|endoftext|>"
# separator and the most bytes of it that may lie in two chunks
SEPARATORS = {
    "document": (re.compile(re.escape(END_OF_TEXT)), len(END_OF_TEXT)),
    "paragraph": (re.compile(rb"\n(?:[ \t\r]{0,255}\n)+"), 512),
}


def read_text(reading: Reading) -> Iterator[Document]:
    """Yield the documents of a file of text.

    Ids count bytes: "<file name>#<offset of the document>". Between two marks or blank lines, text that is only white
    space is not a document; a file that has nothing else is reported.
    """
    split = reading.format.split
    pieces = _lines(reading) if split == "line" else _pieces(reading) if split == "piece" else _separated(reading)
    whole = split == "document"
    blank = 0
    some = False
    for at, raw in pieces:
        some = True
        if not raw.strip():
            blank += 1
            continue
        blank = -1 << 62
        text = reading.decode(raw, at, "text")
        if text is not None and (document := reading.document(text, at if at or not whole else 0, at)) is not None:
            yield document
    if some and blank > 0 and not reading.start and not reading.damaged:
        reading.report("empty file", "the file holds only white space", "remove it, or fill it", reading.first)


def _lines(reading: Reading) -> Iterator[tuple[int, bytes]]:
    for at, lines in line_blocks(reading):
        for line in lines:
            yield at, line.removesuffix(b"\r")
            at += len(line) + 1


def _separated(reading: Reading) -> Iterator[tuple[int, bytes]]:
    separator, reach = SEPARATORS[reading.format.split]
    yield from separated(reading, separator, reach, "document" if reading.format.split == "document" else "paragraph")


def _pieces(reading: Reading) -> Iterator[tuple[int, bytes]]:
    """Yield pieces that end at the first line end after piece_bytes; a line above max_bytes is left out."""
    least, limit = reading.format.piece_bytes, reading.format.max_bytes
    buffer = bytearray()
    at: int | None = None
    searched = least - 1
    skipping = False
    for chunk in reading.text_chunks():
        at = reading.first if at is None else at
        buffer += chunk
        begin = 0
        while (end := buffer.find(b"\n", searched) + 1) > 0:
            if not skipping:
                yield at + begin, bytes(buffer[begin:end])
            begin, searched, skipping = end, end + least - 1, False
        del buffer[:begin]
        at += begin
        searched = max(len(buffer), least - 1)
        if skipping or len(buffer) > least + limit:
            if not skipping:
                reading.giant(at, "line")
            at += len(buffer)
            buffer.clear()
            searched, skipping = 0, True
    if buffer and at is not None and not skipping and not reading.damaged:
        yield at, bytes(buffer)
