"""The bytes of a file in chunks of bounded size, decompressed by its suffix: .gz .bz2 .xz .zst.

Python's own gzip, bz2 and lzma files give no offset of a fault, and zstandard's stream readers end without an error
where the file is cut. Here each member is decompressed by hand, so a member that is cut, damaged or followed by other
bytes is always noticed, and everything before it is still read.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastgpt.data.read.defects import need

CHUNK = 1 << 20  # bytes read at once, and the largest chunk of the decompressors that can be limited
ZSTD_CHUNK = 1 << 13  # zstandard cannot limit its output; 8 KiB of input give at most 256 MiB
COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstandard"}


class Damaged(Exception):
    """Compressed data that cannot be read further: what is wrong."""


def compression_of(path: Path) -> str | None:
    """Return the compression that a file's suffix names, or None."""
    return COMPRESSIONS.get(path.suffix.lower())


def chunks(
    path: Path, start: int = 0, stop: int | None = None, progress: Callable[[int], Any] | None = None
) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file, or of the bytes [start, stop) of an uncompressed one.

    Args:
        progress: called with the number of bytes read from the file, after each read.

    Raises:
        Damaged: the compressed data is cut or wrong; everything before was yielded.
        OSError: the file cannot be read.
    """
    kind = compression_of(path)
    raw = _raw(path, start, stop, progress, ZSTD_CHUNK if kind == "zstandard" else CHUNK)
    yield from raw if kind is None else _decompressed(raw, kind)


def _raw(path: Path, start: int, stop: int | None, progress: Callable[[int], Any] | None, size: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(start)
        left = None if stop is None else stop - start
        while left is None or left > 0:
            chunk = file.read(size if left is None else min(size, left))
            if not chunk:
                return
            if left is not None:
                left -= len(chunk)
            yield chunk
            if progress is not None:
                progress(len(chunk))


class _Member:
    """One member (gzip), stream (bzip2, xz) or frame (zstandard) behind one interface."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.rest = b""  # input not consumed yet because the output was limited (gzip)
        if kind == "gzip":
            self.decoder: Any = zlib.decompressobj(wbits=31)
        elif kind == "bzip2":
            self.decoder = bz2.BZ2Decompressor()
        elif kind == "xz":
            self.decoder = lzma.LZMADecompressor(format=lzma.FORMAT_XZ)
        else:  # large windows: dumps are compressed with `zstd --long=31`
            zstandard = need("zstandard", "reading .zst")
            self.decoder = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what `data` decompresses to; stops at the end of the member."""
        decoder = self.decoder
        if self.kind == "zstandard":
            yield decoder.decompress(data)
            return
        while True:
            yield decoder.decompress(data, CHUNK)
            data = decoder.unconsumed_tail if self.kind == "gzip" else b""
            if decoder.eof or (not data if self.kind == "gzip" else decoder.needs_input):
                return

    @property
    def ended(self) -> bool:
        return bool(self.decoder.eof)

    @property
    def unused(self) -> bytes:
        """The input after the end of the member."""
        return bytes(self.decoder.unused_data)


def _errors() -> tuple[type[Exception], ...]:
    try:
        import zstandard
    except ImportError:
        return (zlib.error, OSError, lzma.LZMAError, EOFError)
    return (zlib.error, OSError, lzma.LZMAError, EOFError, zstandard.ZstdError)


def _decompressed(raw: Iterator[bytes], kind: str) -> Iterator[bytes]:
    member: _Member | None = None
    begun = 0  # offset of the member in the file
    read = members = 0
    errors = _errors()
    for data in raw:
        read += len(data)
        while data:
            if member is None:
                if members and not data.strip(b"\0"):  # padding of tapes and of `xz --block`
                    break
                member, begun = _Member(kind), read - len(data)
            pieces = member.feed(data)
            while True:
                try:
                    piece = next(pieces, None)
                except errors as e:
                    raise Damaged(_damage(kind, begun, members, e)) from None
                if piece is None:
                    break
                if piece:
                    yield piece
            data = b""
            if member.ended:
                data, member = member.unused, None
                members += 1
    if member is not None or not members:
        raise Damaged(f"the {kind} data is cut: the member that begins at byte {begun} of the file is incomplete")


def _damage(kind: str, begun: int, members: int, e: Exception) -> str:
    place = f"the member that begins at byte {begun} of the file"
    if begun and members:
        return f"the {kind} data is damaged or is followed by other bytes: {place} cannot be read ({e})"
    return f"the file is not {kind} data or is damaged: {place} cannot be read ({e})"


class LineCounter:
    """Line numbers of byte offsets, found by reading the file again up to there.

    Offsets that rise are counted in one pass. So readers need to know only offsets, and only a file with defects pays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._restart()

    def _restart(self) -> None:
        self._chunks = chunks(self.path)
        self._chunk, self._start, self._lines = b"", 0, 1

    def line(self, byte: int) -> int:
        """Return the line, from 1, that holds the byte."""
        if byte < self._start:
            self._restart()
        while byte >= self._start + len(self._chunk):
            try:
                chunk = next(self._chunks, None)
            except (Damaged, OSError):
                chunk = None
            if chunk is None:
                break
            self._lines += self._chunk.count(b"\n")
            self._start += len(self._chunk)
            self._chunk = chunk
        return self._lines + self._chunk.count(b"\n", 0, max(byte - self._start, 0))
