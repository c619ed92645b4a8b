"""XML of bounded memory: MediaWiki dumps and the Posts.xml of StackExchange, through expat.

Bytes that are not UTF-8 are found before the parser sees them, so their place is exact and the rest can be read.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from xml.parsers import expat

from fastgpt.data.document import Document
from fastgpt.data.read.html import fragment_text
from fastgpt.data.read.reading import Reading
from fastgpt.data.read.wikitext import plain_text

STARTS = frozenset({"page"})  # elements whose start is handled too
MARK = 0x7F  # in place of each wrong byte, so offsets stay; XML allows it


class _Refused(Exception):
    """A document type with entities: no dump has them, and they can be made to grow without bound."""


class _Utf8:
    """Chunks of UTF-8: each byte that is not, and each NUL, becomes MARK, and its offset is noted in `bad`."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.bad: list[int] = []
        self.any = False

    def chunks(self) -> Iterator[bytes]:
        reading = self.reading
        tail = b""
        at: int | None = None
        for chunk in reading.text_chunks():
            at = reading.first if at is None else at
            data = bytearray(tail + chunk)
            tail = b""
            begin = 0
            while True:
                try:
                    str(data[begin:], "utf-8")
                    break
                except UnicodeDecodeError as e:
                    start, end = begin + e.start, begin + e.end
                    if end == len(data) and e.reason == "unexpected end of data":
                        tail = bytes(data[start:])
                        del data[start:]
                        break
                    self.bad.append(at + start)
                    raw = bytes(data[begin : start + 4096])
                    reading.not_utf8(raw, UnicodeDecodeError("utf-8", raw, e.start, e.end, e.reason), at + begin)
                    data[start:end] = bytes([MARK]) * (end - start)
                    begin = end
            while (nul := data.find(b"\0")) >= 0:
                self.bad.append(at + nul)
                reading.report("NUL", "the file holds a NUL", "remove it, or use mode replace", at + nul)
                data[nul] = MARK
            self.any = True
            yield bytes(data)
            at += len(data)
        if tail and at is not None and not reading.damaged:
            reading.not_utf8(tail, UnicodeDecodeError("utf-8", tail, 0, len(tail), "unexpected end of data"), at)

    def forget(self, before: int) -> bool:
        """Forget the notes before an offset; return whether there were any."""
        found = [b for b in self.bad if b < before]
        self.bad = [b for b in self.bad if b >= before]
        return bool(found)


class _Parser:
    """An expat parser over a file. `handle(name, attributes, text)` is called at the end of each element."""

    def __init__(self, reading: Reading, record: str, wanted: frozenset[str], handle: Callable[..., None]) -> None:
        self.reading, self.record, self.wanted, self.handle = reading, record, wanted, handle
        self.found = False
        self.source = _Utf8(reading)
        self.parser = expat.ParserCreate("utf-8", "}")
        self.parser.buffer_text = True
        self.parser.buffer_size = 1 << 16
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.EntityDeclHandler = self._entity
        self.attributes: dict[str, str] = {}
        self.text: list[str] = []
        self.size = self.begin = 0

    @property
    def at(self) -> int:
        """Offset of the element whose handler runs."""
        return self.reading.first + self.parser.CurrentByteIndex

    def run(self) -> Iterator[None]:
        """Parse the file; yields after each chunk, so the caller can take what was handled."""
        try:
            for chunk in self.source.chunks():
                self.parser.Parse(chunk, False)
                yield
            if not self.reading.damaged:
                self.parser.Parse(b"", True)
                if not self.found and self.source.any:
                    problem = f"the file holds no <{self.record}>"
                    self.reading.report("empty file", problem, "declare its format, or remove it", self.reading.first)
        except _Refused:
            problem = "the XML declares entities, which no dump does; the file is not read"
            self.reading.report("broken XML", problem, "remove the declarations", self.at)
        except expat.ExpatError as e:
            if not self.reading.damaged and self.parser.ErrorByteIndex >= 0:
                byte = self.reading.first + self.parser.ErrorByteIndex
                problem = f"the XML is broken: {expat.ErrorString(e.code)}; the rest of the file is not read"
                self.reading.report("broken XML", problem, "fetch it again", byte)
        yield

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        name = name.rpartition("}")[2]
        self.text.clear()
        self.size = 0
        self.attributes = attributes
        self.found = self.found or name == self.record
        self.begin = self.at
        self.parser.CharacterDataHandler = self._characters if name in self.wanted else None
        if name in STARTS:
            self.handle(name, None, "")

    def _characters(self, text: str) -> None:
        self.size += len(text)
        if self.size <= self.reading.format.max_bytes:
            self.text.append(text)

    def _end(self, name: str) -> None:
        self.handle(name.rpartition("}")[2], self.attributes, "".join(self.text))
        self.parser.CharacterDataHandler = None

    def _entity(self, *_: object) -> None:
        raise _Refused


def read_mediawiki(reading: Reading) -> Iterator[Document]:
    """Yield the pages of namespace 0 of a MediaWiki dump as plain text; redirects and empty pages are passed over.

    Ids are those of the pages; meta has the title.
    """
    ready: list[Document] = []
    page: dict[str, str] = {}
    begin = 0

    def handle(name: str, attributes: dict[str, str] | None, text: str) -> None:
        nonlocal begin
        if attributes is None:
            page.clear()
            begin = parser.at
            parser.source.forget(begin)
        elif name in ("title", "ns", "text"):
            page[name] = text
            if parser.size > reading.format.max_bytes:
                page["giant"] = ""
        elif name == "id":
            page.setdefault("id", text)
        elif name == "redirect":
            page["redirect"] = ""
        elif name == "page":
            document = _page(reading, page, begin, parser.source.forget(parser.at))
            if document is not None:
                ready.append(document)

    parser = _Parser(reading, "page", frozenset({"title", "ns", "text", "id"}), handle)
    for _ in parser.run():
        yield from ready
        ready.clear()


def _page(reading: Reading, page: dict[str, str], begin: int, bad: bool) -> Document | None:
    if page.get("ns", "0") != "0" or "redirect" in page or (bad and reading.format.mode != "replace"):
        return None
    if "giant" in page:
        reading.giant(begin, "page")
        return None
    if "text" not in page or not page.get("id"):
        what = "text" if "text" not in page else "id"
        reading.report("missing field", f"the page has no {what}", "fetch a dump of articles", begin)
        return None
    title = page.get("title", "")
    source = page["text"].replace(chr(MARK), "\ufffd") if bad else page["text"]
    return reading.document(plain_text(source), 0, begin, page["id"], {"title": title} if title else None)


def read_stackexchange(reading: Reading) -> Iterator[Document]:
    """Yield each question of a Posts.xml with its answers: the accepted one first, then by score.

    Answers stand anywhere after their question, so the posts lie in a temporary database on disk meanwhile. An answer
    without its question is passed over. Ids are those of the questions; meta has title, tags, score and license.
    """
    store = sqlite3.connect("", isolation_level=None)  # a temporary file, deleted when it is closed
    try:
        store.execute("PRAGMA cache_size = -32768")
        store.execute("PRAGMA journal_mode = OFF")
        store.execute("BEGIN")
        store.execute(
            "CREATE TABLE posts (question INTEGER, kind INTEGER, rank INTEGER, id INTEGER, byte INTEGER, title TEXT,"
            " tags TEXT, license TEXT, accepted INTEGER, body TEXT)"
        )

        def handle(name: str, attributes: dict[str, str] | None, text: str) -> None:
            if name == "row" and attributes is not None:
                bad = parser.source.forget(parser.at)
                if bad and reading.format.mode == "replace":
                    attributes = {k: v.replace(chr(MARK), "\ufffd") for k, v in attributes.items()}
                post = None if bad and reading.format.mode != "replace" else _post(reading, attributes, parser.begin)
                if post is not None:
                    store.execute("INSERT INTO posts VALUES (?,?,?,?,?,?,?,?,?,?)", post)

        parser = _Parser(reading, "row", frozenset(), handle)
        for _ in parser.run():
            pass
        store.execute("CREATE INDEX by_question ON posts (question, kind, rank, id)")
        yield from _threads(reading, store)
    finally:
        store.close()


def _post(reading: Reading, row: dict[str, str], begin: int) -> tuple[object, ...] | None:
    """Return a post as a row of the database; None if it is neither question nor answer, or broken (with a report)."""
    kind = row.get("PostTypeId")
    if kind not in ("1", "2"):
        return None
    numbers = {}
    for field in ("Id", "Score", "ParentId", "AcceptedAnswerId"):
        value = row.get(field, "0" if field != "Id" and (field != "ParentId" or kind == "1") else None)
        digits = "" if value is None else value.removeprefix("-")
        if not (digits.isascii() and digits.isdigit() and len(digits) < 18):
            kinds = ("missing field", "is missing") if value is None else ("wrong type", "is not a whole number")
            reading.report(kinds[0], f"the attribute {field!r} {kinds[1]}", "fetch the dump again", begin)
            return None
        numbers[field] = int(value or 0)
    body = row.get("Body", "")
    if len(body) > reading.format.max_bytes:
        reading.giant(begin, "post")
        return None
    question = numbers["Id"] if kind == "1" else numbers["ParentId"]
    own = (numbers["Id"], begin, row.get("Title", ""), row.get("Tags", ""), row.get("ContentLicense", ""))
    return (question, int(kind), -numbers["Score"], *own, numbers["AcceptedAnswerId"], body)


def _threads(reading: Reading, store: sqlite3.Connection) -> Iterator[Document]:
    """Yield the questions with their answers from the database, in the order of the questions' ids."""
    answers = store.cursor()
    fields = "rank, id, byte, title, tags, license, accepted, body"
    for question in store.execute(f"SELECT {fields} FROM posts WHERE kind = 1 ORDER BY question"):
        rank, number, byte, title, tags, license, accepted, body = question
        pieces = [title, fragment_text(body)]
        size = len(body)
        for (answer,) in answers.execute(
            "SELECT body FROM posts WHERE question = ? AND kind = 2 ORDER BY id != ?, rank, id", (number, accepted)
        ):
            size += len(answer)
            if size > reading.format.max_bytes:
                break
            pieces.append(fragment_text(answer))
        if size > reading.format.max_bytes:
            reading.giant(byte, "question with its answers")
            continue
        meta = {"title": title, "tags": " ".join(tags.strip("<>|").replace("><", "|").split("|")), "score": str(-rank)}
        meta["license"] = license
        text = "\n\n".join(piece for piece in pieces if piece)
        document = reading.document(text, number, byte, str(number), {k: v for k, v in meta.items() if v})
        if document is not None:
            yield document
