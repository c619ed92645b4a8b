"""Reading: one file, or one part of it, on its way through a reader."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastgpt.data.document import Document
from fastgpt.data.read.defects import Defect, DefectError, OnDefect
from fastgpt.data.read.format import Format
from fastgpt.data.read.streams import Damaged, LineCounter, chunks, compression_of

SURROGATE = re.compile("[\ud800-\udfff]")
SNIFF = 8192
SAMPLE = 4096
WIDE_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"),
)  # fmt: skip
MAGIC = (
    (b"\x1f\x8b", "gzip data", "add .gz to its name"), (b"BZh", "bzip2 data", "add .bz2 to its name"),
    (b"\xfd7zXZ\0", "xz data", "add .xz to its name"), (b"\x28\xb5\x2f\xfd", "zstandard data", "add .zst to its name"),
    (b"PK\3\4", "a zip archive", "unpack it"), (b"%PDF-", "a PDF file", "extract its text first, with pdftotext"),
    (b"\x89PNG\r\n", "a PNG image", "leave it out"), (b"\xff\xd8\xff", "a JPEG image", "leave it out"),
    (b"GIF8", "a GIF image", "leave it out"), (b"\x7fELF", "a program", "leave it out"),
    (b"SQLite format 3\0", "an SQLite database", "export its text first"),
    (b"PAR1", "a parquet file", "name it .parquet, or declare format parquet"),
)  # fmt: skip
_CONTROL = bytes(i for i in range(32) if i not in b"\t\n\r\f\b\x1b")
ICONV = {"latin_1": "ISO-8859-1", "mac_roman": "MACINTOSH"}


class Reading:
    """One file, or the bytes [start, stop) of it: its chunks, its defects and its documents.

    Attributes:
        file: the path, for messages. name: the first part of ids.
        first: offset of the first byte of text, once text_chunks() has begun: 3 after a UTF-8 mark.
        row: set by readers of rows, whose defects have no line and byte.
        damaged: whether compressed data ended early; the record in progress is then incomplete.
    """

    def __init__(
        self,
        path: Path,
        format: Format,
        on_defect: OnDefect | None,
        name: str | None = None,
        start: int = 0,
        stop: int | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> None:
        self.path, self.format, self.start, self.stop = path, format, start, stop
        self.file = printable(path)
        self.name = path.name if name is None else name
        self.damaged = False
        self.first = start
        self.row: int | None = None
        self._on_defect = on_defect
        self._progress = progress
        self._lines = LineCounter(path)
        self._guess: str | None = None
        extra = {"license": format.license, "source": format.source}
        self._extra = {k: v for k, v in extra.items() if v}

    def chunks(self) -> Iterator[bytes]:
        """Yield the decompressed bytes; compressed data that is damaged ends them early."""
        at = self.start
        try:
            for chunk in chunks(self.path, self.start, self.stop, self._progress):
                yield chunk
                at += len(chunk)
        except Damaged as e:
            self.damaged = True
            self.report("damaged", f"{e}", "fetch or compress it again; the text before this place can be read", at)

    def advance(self, size: int) -> None:
        """Add to the progress the bytes that were read in another way than by chunks()."""
        if self._progress is not None:
            self._progress(size)

    def whole(self, stream: Iterator[bytes], what: str) -> bytes | None:
        """Return all bytes of a file; None, with a report, if it is empty, damaged, no text, or above max_bytes."""
        pieces, size = [], 0
        for chunk in stream:
            size += len(chunk)
            if size > self.format.max_bytes:
                self.giant(0, what)
                return None
            pieces.append(chunk)
        return b"".join(pieces) if size and not self.damaged else None

    def text_chunks(self) -> Iterator[bytes]:
        """Yield the chunks of a file of text without its UTF-8 mark: none if it is empty, binary, UTF-16 or UTF-32."""
        stream = self.chunks()
        first = b""
        while len(first) < SNIFF and (chunk := next(stream, None)) is not None:
            first += chunk
        if not self.start and not self.sniff(first):
            return
        if not self.start and first.startswith(codecs.BOM_UTF8):
            self.first = len(codecs.BOM_UTF8)
        yield first[self.first - self.start :]
        yield from stream

    def sniff(self, first: bytes) -> bool:
        """Return whether a file that begins so is text; reports it if it is not."""
        if not first:
            if not self.damaged:
                self.report("empty file", "the file is empty", "remove it, or fill it", None)
            return False
        for mark, encoding in WIDE_MARKS:
            if first.startswith(mark):
                remedy = f"convert it with iconv -f {encoding} -t UTF-8"
                self.report("wide encoding", f"the file begins with the byte-order mark of {encoding}", remedy, 0)
                return False
        for magic, what, remedy in MAGIC:
            if first.startswith(magic):
                self.report("binary", f"the file is {what}, expected text", remedy, 0)
                return False
        head = first[:SNIFF]
        controls = len(head) - len(head.translate(None, _CONTROL))
        if controls >= 8 and controls > len(head) // 20:
            wide = max(head[0::2].count(0), head[1::2].count(0)) > 0.3 * len(head)
            remedy = "convert it with iconv -f UTF-16 -t UTF-8" if wide else "leave it out, or extract its text first"
            problem = "the file is UTF-16 without a byte-order mark" if wide else "the file is binary, expected text"
            self.report("wide encoding" if wide else "binary", problem, remedy, 0)
            return False
        return True

    def report(self, kind: str, problem: str, remedy: str, byte: int | None) -> None:
        """Report a defect at an offset in the decompressed file; in mode "fail" this raises DefectError."""
        if self.row is not None:
            byte = None
        line = None if byte is None else self._lines.line(byte)
        packed = compression_of(self.path) is not None
        defect = Defect(self.file, line, byte, problem, remedy, kind, packed, self.row)
        if self._on_defect is not None:
            self._on_defect(defect)
        if self.format.mode == "fail":
            raise DefectError(defect)

    def decode(self, raw: bytes, byte: int, what: str) -> str | None:
        """Return the text of raw bytes that begin at `byte`; None if a defect was found and the mode is "skip".

        Args:
            what: what is left out in mode "skip": "the record", "the file".
        """
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as e:
            self.not_utf8(raw, e, byte)
            if self.format.mode != "replace":
                return None
            text = raw.decode("utf-8", "replace")
        return self.strict(text, byte, raw)

    def not_utf8(self, raw: bytes, e: UnicodeDecodeError, byte: int) -> None:
        """Report bytes that are not UTF-8, with a guess of what they are."""
        at = e.start
        if raw[at] == 0xED and at + 1 < len(raw) and raw[at + 1] >= 0xA0:
            problem = "a lone surrogate is encoded as if it were UTF-8"
            self.report("lone surrogate", problem, "write the character itself, or use mode replace", byte + at)
            return
        if self._guess is None:
            begin = max(raw.rfind(b"\n", 0, at) + 1, at - SAMPLE // 2)
            self._guess = guess_encoding(raw[begin : begin + SAMPLE])
        if self._guess:
            remedy = f"it looks like {self._guess}: convert it with iconv -f {self._guess} -t UTF-8"
        else:
            remedy = "convert it to UTF-8, or use mode replace"
        self.report("not UTF-8", f"byte 0x{raw[at]:02x} is not UTF-8 ({e.reason})", remedy, byte + at)

    def strict(self, text: str, byte: int, raw: bytes | None = None) -> str | None:
        """Return text without NULs and lone surrogates; None if it has some and the mode is "skip".

        Args:
            raw: the bytes of the text, to find the offset of a NUL; None: `byte` is reported.
        """
        if "\0" in text:
            at = max(raw.find(b"\0"), 0) if raw is not None else 0
            self.report("NUL", "the text holds a NUL", "remove it, or use mode replace", byte + at)
            if self.format.mode != "replace":
                return None
            text = text.replace("\0", "\ufffd")
        return text

    def without_surrogates(self, text: str, byte: int) -> str | None:
        """Return text without lone surrogates, as `strict` does."""
        if not text.isascii() and SURROGATE.search(text):
            remedy = "write the character itself, or use mode replace"
            self.report("lone surrogate", "the text holds a lone surrogate", remedy, byte)
            if self.format.mode != "replace":
                return None
            text = SURROGATE.sub("\ufffd", text)
        return text

    def giant(self, byte: int, what: str = "record", remedy: str = "split it, or raise max_bytes") -> None:
        """Report a record above the limit."""
        self.report("giant", f"the {what} is larger than {self.format.max_bytes:,} bytes", remedy, byte)

    def document(
        self, text: str, number: int, byte: int, own: str | None = None, meta: dict[str, str] | None = None
    ) -> Document | None:
        """Return a document; None if the format declares its text to stand for none, or, with a report, if it is blank.

        Args:
            number: of the record, for its id unless it has its `own`.
        """
        if text in self.format.blank:
            return None
        if not text or text.isspace():
            self.report("empty record", "the record has no text", "remove it", byte)
            return None
        meta = {**self._extra, **meta} if meta else dict(self._extra)
        return Document(text, f"{self.name}#{number}" if own is None else own, self.file, meta)


def printable(path: Path) -> str:
    """Return a path as strict Unicode: bytes of its name that are not UTF-8 become escapes."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def guess_encoding(sample: bytes) -> str:
    """Return the encoding that a sample looks like, in the spelling of iconv; "" if nothing fits or charset-normalizer
    is not installed. Of several that fit as well, it is CP1252, by far the most common: a short sample fits many."""
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        return ""
    found = from_bytes(sample)
    best = found.best()
    if best is None or best.encoding in ("utf_8", "ascii"):
        return ""
    western = [m for m in found if "cp1252" in (m.encoding, *m.could_be_from_charset)]
    if any(m.chaos <= best.chaos and m.coherence >= best.coherence for m in western):
        return "CP1252"
    return ICONV.get(best.encoding, best.encoding.replace("_", "-").upper())
