"""WARC and WET, the files of web archives and Common Crawl.

Records of type "conversion" (WET) are text; "response" and "resource" records are pages, whose HTML becomes text. The
others hold no text and are passed over. Each record is checked against its Content-Length: warcio and others take a
record that is cut for a whole one.

Format: ISO 28500 (WARC 1.0 and 1.1).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from fastgpt.data.document import Document
from fastgpt.data.read.html import decode_html, page_text
from fastgpt.data.read.reading import Reading

VERSION = re.compile(rb"WARC/1\.[01]\r?\n")
NEXT = re.compile(rb"(?:\r?\n){1,2}WARC/1\.[01]\r?\n")
HEADERS_END = re.compile(rb"\r?\n\r?\n")
MAX_HEADERS = 1 << 16


class _Buffer:
    """The bytes of a stream, read on demand; `at` is the offset of its first byte."""

    def __init__(self, reading: Reading) -> None:
        self._stream = reading.chunks()
        self.data = bytearray()
        self.at = 0

    def more(self) -> bool:
        """Append a chunk; return whether there was one."""
        chunk = next(self._stream, None)
        if chunk is None:
            return False
        self.data += chunk
        return True

    def have(self, size: int) -> bool:
        """Read until `size` bytes are there; return whether they are."""
        while len(self.data) < size and self.more():
            pass
        return len(self.data) >= size

    def drop(self, size: int) -> None:
        """Drop the first bytes."""
        self.at += min(size, len(self.data))
        del self.data[:size]


@dataclass
class _Record:
    """One record. at: offset of its content; content: None if it is above max_bytes or not wanted."""

    headers: dict[str, str]
    begin: int
    at: int
    content: bytes | None


def read_warc(reading: Reading) -> Iterator[Document]:
    """Yield the documents of a WARC or WET file. Ids are the records' own; meta has url, date and language."""
    for number, record in enumerate(_records(reading)):
        kind = record.headers.get("warc-type", "")
        if record.content is None:
            continue
        page: tuple[str, str] | None
        if kind == "conversion":
            text = reading.decode(record.content, record.at, "record")
            page = None if text is None else ("", text)
        else:
            page = _page(reading, record, kind)
        if page is None:
            continue
        meta = {"title": page[0]} if page[0] else {}
        for name, field in (
            ("url", "warc-target-uri"), ("date", "warc-date"), ("language", "warc-identified-content-language"),
        ):  # fmt: skip
            if field in record.headers:
                meta[name] = record.headers[field].strip("<>")
        own = record.headers.get("warc-record-id", "").strip("<>") or None
        document = reading.document(page[1], number, record.begin, own, meta)
        if document is not None:
            yield document


def _records(reading: Reading) -> Iterator[_Record]:
    """Yield the records of a file; the content only of those that may hold text."""
    buffer = _Buffer(reading)
    if not buffer.have(1):
        if not reading.damaged:
            reading.report("empty file", "the file is empty", "remove it, or fetch it again", None)
        return
    while True:
        while buffer.data[:1] in (b"\r", b"\n") or (not buffer.data and buffer.more()):
            buffer.drop(len(buffer.data) - len(buffer.data.lstrip(b"\r\n")))
        if not buffer.data:
            return
        headers = _headers(reading, buffer)
        if headers is None:
            if not _resync(buffer):
                return
            continue
        begin = buffer.at
        length = headers.pop("", "0")
        buffer.drop(int(length))
        if (record := _content(reading, buffer, headers, begin)) is not None:
            yield record
        if reading.damaged or not buffer.have(1):
            return


def _headers(reading: Reading, buffer: _Buffer) -> dict[str, str] | None:
    """Return the headers of the record at the buffer's start; "" has their length. None, with a report: no record."""
    buffer.have(12)
    while (end := HEADERS_END.search(buffer.data, 0, MAX_HEADERS)) is None:
        if len(buffer.data) >= MAX_HEADERS or not buffer.more():
            break
    if VERSION.match(buffer.data) is None:
        what = "WARC record" if buffer.at else "WARC file: it does not begin with WARC/1.0 or WARC/1.1"
        reading.report("broken WARC", f"this is no {what}", "fetch it again, or declare its format", buffer.at)
        return None
    if end is None:
        if not reading.damaged:
            reading.report("broken WARC", "the headers of the record do not end", "fetch it again", buffer.at)
        return None
    lines = bytes(buffer.data[: end.start()]).decode("utf-8", "replace").splitlines()[1:]
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip().lower()] = value.strip()
    length = headers.get("content-length", "")
    if not (length.isascii() and length.isdigit() and len(length) < 16):
        reading.report("broken WARC", "the record has no valid Content-Length", "fetch it again", buffer.at)
        return None
    headers[""] = str(end.end())
    return headers


def _resync(buffer: _Buffer) -> bool:
    """Drop bytes up to the next record; return whether there is one."""
    while True:
        found = NEXT.search(buffer.data, 1) if buffer.data else None
        if found is not None:
            buffer.drop(found.start())
            return True
        buffer.drop(max(len(buffer.data) - 16, 0))
        if not buffer.more():
            buffer.drop(len(buffer.data))
            return False


def _content(reading: Reading, buffer: _Buffer, headers: dict[str, str], begin: int) -> _Record | None:
    """Take a record's content off the buffer; None, with a report, if it is not as long as it says, or too long."""
    length = int(headers["content-length"])
    at = buffer.at
    wanted = headers.get("warc-type") in ("conversion", "response", "resource")
    if length > reading.format.max_bytes:
        if wanted:
            reading.giant(begin)
        left = length
        while left > 0 and buffer.have(1):
            step = min(left, len(buffer.data))
            buffer.drop(step)
            left -= step
        return None
    there = buffer.have(length + 2)
    ends = buffer.data[length : length + 4].lstrip(b"\r\n")
    if (len(buffer.data) >= length and not there) or (there and len(ends) < 4 and buffer.data[length] in b"\r\n"):
        content = bytes(buffer.data[:length])
        buffer.drop(length)
        return _Record(headers, begin, at, content if wanted else None)
    following = NEXT.search(buffer.data, 0)
    found = following.start() if following is not None else len(buffer.data)
    if not reading.damaged:
        if found < length:
            problem = f"the record has {found:,} bytes, shorter than its Content-Length of {length:,}"
        else:
            problem = f"the record is longer than its Content-Length of {length:,}"
        reading.report("short record", problem, "fetch the file again", begin)
    if following is None:
        _resync(buffer)
    else:
        buffer.drop(found)
    return None


def _page(reading: Reading, record: _Record, kind: str) -> tuple[str, str] | None:
    """Return (title, text) of a response or resource; None if it is not a page or not readable (then with a report)."""
    content = record.content or b""
    mime = record.headers.get("content-type", "")
    at = record.at
    if kind == "response":
        end = HEADERS_END.search(content)
        status = re.match(rb"HTTP/\S+ (\d+)", content)
        if end is None or status is None or status[1] != b"200":
            return None
        headers = _http_headers(content[: end.start()])
        mime = headers.get("content-type", "")
        at += end.end()
        body = _body(content[end.end() :], headers)
        if body is None:
            reading.report("broken page", "the body of the response cannot be decoded", "leave it out", record.begin)
            return None
        content = body
    charset = re.search(r"charset=\s*[\"']?([\w.:-]+)", mime)
    if not re.match(r"text/(html|plain)|application/xhtml", mime.lower()):
        return None
    text = decode_html(reading, content, at, charset[1] if charset else "")
    if text is None:
        return None
    return ("", text) if mime.lower().startswith("text/plain") else page_text(text)


def _http_headers(raw: bytes) -> dict[str, str]:
    lines = raw.decode("latin-1").splitlines()[1:]
    return {n.strip().lower(): v.strip() for n, colon, v in (line.partition(":") for line in lines) if colon}


def _body(body: bytes, headers: dict[str, str]) -> bytes | None:
    """Return a body without its transfer and content encodings; None if it is not so encoded."""
    if "chunked" in headers.get("transfer-encoding", "").lower() and (plain := _unchunked(body)) is not None:
        body = plain  # Common Crawl has removed the chunks, but not the header
    encoding = headers.get("content-encoding", "identity").lower()
    if encoding in ("gzip", "x-gzip", "deflate") and body[:1] != b"<":
        decoder = zlib.decompressobj(wbits=47)
        try:
            body = decoder.decompress(body, 1 << 26)
        except zlib.error:
            return None
    elif encoding not in ("identity", "", "gzip", "x-gzip", "deflate", "utf-8"):
        return None
    return body


def _unchunked(body: bytes) -> bytes | None:
    out: list[bytes] = []
    at = 0
    while (size := re.compile(rb"([0-9A-Fa-f]{1,8})[^\r\n]{0,200}\r\n").match(body, at)) is not None:
        count = int(size[1], 16)
        if not count:
            return b"".join(out)
        out.append(body[size.end() : size.end() + count])
        at = size.end() + count + 2
    return None
