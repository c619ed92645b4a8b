"""JSON: lines of it, or files with one record, a list of records, or several records after each other.

orjson reads a record; where it refuses, or where a number or a repeated key needs care, Python's own json says more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from fastgpt.data.document import Document
from fastgpt.data.read.defects import need
from fastgpt.data.read.fields import KINDS, Fields
from fastgpt.data.read.lines import line_blocks
from fastgpt.data.read.reading import SURROGATE, Reading

KEY = re.compile(rb'"\s*:')
KEY_QUOTED = re.compile(rb'\\"\s*:')


def read_jsonl(reading: Reading) -> Iterator[Document]:
    """Yield the documents of JSON lines. Blank lines are no records; ids count bytes, so parts give the same ids."""
    records = Records(reading)
    for at, lines in line_blocks(reading):
        for line in lines:
            if line and not line.isspace() and (document := records.document(line, at, at)) is not None:
                yield document
            at += len(line) + 1


class Records:
    """From the bytes of one JSON object to a document."""

    def __init__(self, reading: Reading) -> None:
        orjson = need("orjson", f"reading {reading.file}")
        self.loads, self.error = orjson.loads, orjson.JSONDecodeError
        self.reading = reading
        self.fields = Fields(reading)
        format = reading.format
        fields = (*format.text_fields, *format.meta, *([format.id] if format.id else []))
        self.names = {part for name in fields for part in (name, *name.split("."))}

    def document(self, raw: bytes, number: int, byte: int) -> Document | None:
        """Return the document of a record that begins at `byte`; None, with a report, if it is broken."""
        record = self.record(raw, byte)
        return None if record is None else self.fields.document(record, number, byte, lambda: _exact(raw))

    def record(self, raw: bytes, byte: int) -> dict[str, Any] | None:
        """Return a record that begins at `byte`, with the types of the file; None, with a report, if it is broken."""
        try:
            record = self.loads(raw)
        except self.error:
            record = self._careful(raw, byte)
            if record is None:
                return None
        if not isinstance(record, dict):
            problem = f"the record is {_kind(record)}, expected an object with named fields"
            self.reading.report("wrong type", problem, 'write it as {"text": ...}', byte)
            return None
        colons = len(KEY.findall(raw))
        if colons != len(record) and (key := _repeated(raw, record, colons)) is not None:
            named = f"the key {key!r}" if key in self.names else "a key"  # others may be contents
            self.reading.report("key twice", f"{named} is there twice", "keep one of them", byte)
            return None
        return record

    def _careful(self, raw: bytes, byte: int) -> Any:
        """Return a record that orjson refused: repaired in mode "replace", else None; report what is wrong."""
        text = self.reading.decode(raw, byte, "record")
        if text is None:
            return None
        text = text.removeprefix("\ufeff")  # files joined by `cat`
        try:
            record = json.loads(text, parse_constant=_refuse)
        except json.JSONDecodeError as e:
            message = e.msg.removesuffix(" starting at").removesuffix(" at")
            problem = f"the JSON is broken: {message[0].lower()}{message[1:]} at column {e.colno}"
            offset = len(text[: e.pos].encode("utf-8", "surrogatepass"))
            self.reading.report("broken JSON", problem, "repair or remove the record", byte + min(offset, len(raw)))
            return None
        except (RecursionError, ValueError) as e:
            problem = "it is nested too deeply" if isinstance(e, RecursionError) else str(e)
            self.reading.report("broken JSON", f"the JSON is broken: {problem}", "repair or remove the record", byte)
            return None
        lone = _lone(record)
        if lone:
            found = re.search(rb"\\u[dD][89a-fA-F]", raw)
            remedy = "write the character itself, or use mode replace"
            place = byte + (found.start() if found else 0)
            self.reading.report("lone surrogate", "the JSON holds the escape of a lone surrogate", remedy, place)
            return _mended(record) if self.reading.format.mode == "replace" else None
        return record


def _kind(value: Any) -> str:
    return "null" if value is None else KINDS.get(type(value), "something else")


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _exact(raw: bytes) -> Any:
    """Return a record with its numbers as text, digit by digit."""
    return json.loads(raw, parse_float=str, parse_int=str)


def _repeated(raw: bytes, record: dict[str, Any], colons: int) -> str | None:
    """Return a key that an object of the record has twice.

    The keys of the parsed record are counted against the quotes that a colon follows; of these, quotes inside texts are
    escaped and do not count. Only where the numbers differ does the slow parser look.
    """
    keys = _keys(record)
    if keys == colons or keys == colons - len(KEY_QUOTED.findall(raw)):
        return None
    twice: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [key for key, _ in pairs]
            twice.append(next(key for key in names if names.count(key) > 1))
        return found

    try:
        json.loads(raw, object_pairs_hook=note)
    except RecursionError:
        return None
    return twice[0] if twice else None


def _keys(value: Any) -> int:
    if type(value) is dict:
        return len(value) + sum(_keys(v) for v in value.values() if type(v) is dict or type(v) is list)
    return sum(_keys(v) for v in value if type(v) is dict or type(v) is list)


def _lone(value: Any) -> bool:
    """Return whether any text or key inside a value holds a lone surrogate."""
    if isinstance(value, str):
        return not value.isascii() and SURROGATE.search(value) is not None
    if isinstance(value, dict):
        return any(_lone(k) or _lone(v) for k, v in value.items())
    return isinstance(value, list) and any(map(_lone, value))


def _mended(value: Any) -> Any:
    """Return a value with U+FFFD in place of lone surrogates."""
    if isinstance(value, str):
        return SURROGATE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_mended(k): _mended(v) for k, v in value.items()}
    return [_mended(v) for v in value] if isinstance(value, list) else value


TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["{}\[\]]', re.DOTALL)


def read_json(reading: Reading) -> Iterator[Document]:
    """Yield the documents of a file with one record, with a list of records, or with several after each other.

    Only the record in progress is in memory. Ids count records from 0.
    """
    records = Records(reading)
    for number, (at, raw) in enumerate(json_values(reading)):
        if (document := records.document(raw, number, at)) is not None:
            yield document


class _Scan:
    """The place in a stream of JSON: how deep, and where the record in progress begins."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.at = 0  # offset of the buffer
        self.buffer = bytearray()
        self.scanned = self.end = 0  # in the buffer: searched up to, end of the last record
        self.depth = self.records = 0
        self.inside = self.closed = False  # of the list around the records
        self.begin = 0

    def between(self, stop: int, last: bool = False) -> None:
        """Report what stands between two records, unless it is white space and, in a list, one comma."""
        found = bytes(self.buffer[self.end : stop]).strip()
        if found != (b"," if self.inside and self.records and not last else b""):
            expected = "one comma" if self.inside and not self.closed and self.records else "nothing"
            problem = f"the JSON is broken: expected {expected} between two records, or before and after them"
            self.reading.report("broken JSON", problem, "repair the place", self.at + self.end)

    def values(self) -> Iterator[tuple[int, bytes]]:
        """Yield the records that end in the buffer."""
        while (token := TOKEN.search(self.buffer, self.scanned)) is not None:
            byte = self.buffer[token.start()]
            if byte == 34 and token.end() - token.start() == 1:  # a text that has not ended yet
                self.scanned = token.start()
                return
            self.scanned = token.end()
            base = int(self.inside)
            if byte == 91 and not self.depth and not self.records and not self.closed:
                self.between(token.start())
                self.inside, self.depth, self.end = True, 1, token.end()
            elif byte in b"{[":
                if self.depth == base:
                    self.between(token.start())
                    self.begin = token.start()
                self.depth += 1
            elif byte in b"}]" and self.depth > base:
                self.depth -= 1
                if self.depth == base:
                    if token.end() - self.begin > self.reading.format.max_bytes:
                        self.reading.giant(self.at + self.begin)
                    else:
                        yield self.at + self.begin, bytes(self.buffer[self.begin : token.end()])
                    self.records += 1
                    self.end = token.end()
            elif byte == 93 and self.inside:
                self.between(token.start(), last=True)
                self.inside, self.closed, self.depth, self.end = False, True, 0, token.end()


def json_values(reading: Reading) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of each record of a JSON file."""
    scan = _Scan(reading)
    begun = False
    for chunk in reading.text_chunks():
        if not begun:
            scan.at, begun = reading.first, True
        scan.buffer += chunk
        yield from scan.values()
        keep = scan.begin if scan.depth > scan.inside else min(scan.end, scan.scanned)
        del scan.buffer[:keep]
        scan.at += keep
        scan.scanned, scan.end, scan.begin = scan.scanned - keep, scan.end - keep, scan.begin - keep
        if len(scan.buffer) > reading.format.max_bytes:
            reading.giant(scan.at, remedy="raise max_bytes, or write one record a line (jsonl); the rest is not read")
            return
    if reading.damaged or not begun:
        return
    if scan.depth:
        what = "a record" if scan.depth > scan.inside else "the list of records"
        place = scan.at + len(scan.buffer)
        reading.report("broken JSON", f"the JSON is broken: the file ends inside {what}", "fetch it again", place)
        return
    scan.between(len(scan.buffer), last=True)
    if not scan.records and not scan.closed:
        reading.report("empty file", "the file holds no record", "remove it, or fill it", reading.first)
