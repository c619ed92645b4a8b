"""Parts: pieces of the input that workers read independently of each other."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.data.read.files import SourceFile, find_files
from fastgpt.data.read.format import Format
from fastgpt.data.read.reading import printable
from fastgpt.data.read.streams import CHUNK, compression_of
from fastgpt.data.read.text import SEPARATORS

LINE_END = re.compile(rb"\n")


@dataclass(frozen=True, slots=True)
class Part:
    """The bytes [start, stop) of a file.

    Attributes:
        name: of the file, the first part of ids.
        digest: SHA-256 of these bytes, in hexadecimal.
    """

    path: Path
    name: str
    start: int
    stop: int
    digest: str

    @property
    def size(self) -> int:
        return self.stop - self.start


def parts_of(
    path: str | Path | SourceFile, format: Format | None = None, size: int = 64 << 20, progress: Any = None
) -> list[Part]:
    """Return the parts of a path, in order; read together they give the documents of the path.

    Uncompressed files of lines are cut at line ends, text at the ends of its documents or paragraphs; every cut is the
    first possible one after a multiple of `size`. Compressed files and other formats are one part each.

    Args:
        size: bytes of a part, about.
        progress: called with the number of bytes read, after each read (the bytes are hashed).

    Raises:
        UserError: as find_files, or a file that cannot be read.
    """
    format = format or Format()
    if size < 1:
        raise ValueError(f"parts_of: size must be at least 1, got {size}")
    files = [path] if isinstance(path, SourceFile) else find_files(path, format).files
    return [part for file in files for part in _parts(file, format.resolved(file.path), size, progress)]


def _parts(file: SourceFile, format: Format, size: int, progress: Callable[[int], Any] | None) -> Iterator[Part]:
    separator = None if compression_of(file.path) else _separator(format)
    try:
        cuts = [0]
        if separator is not None:
            while (cut := _next(file.path, separator, cuts[-1] + size)) is not None:
                cuts.append(cut)
        with open(file.path, "rb") as stream:
            for i, start in enumerate(cuts):
                digest = hashlib.sha256()
                stop, last = start, i + 1 == len(cuts)
                while (last or stop < cuts[i + 1]) and (
                    data := stream.read(CHUNK if last else min(CHUNK, cuts[i + 1] - stop))
                ):
                    digest.update(data)
                    stop += len(data)
                    if progress is not None:
                        progress(len(data))
                yield Part(file.path, file.name, start, stop, digest.hexdigest())
    except OSError as e:
        raise UserError(f"cannot read {printable(file.path)}: {e.strerror}") from None


def _separator(format: Format) -> re.Pattern[bytes] | None:
    """Return what ends a record of a format; None: the files are not cut."""
    if format.name == "jsonl":
        return LINE_END
    if format.name not in ("text", "markdown"):
        return None
    return SEPARATORS[format.split][0] if format.split in SEPARATORS else LINE_END


def _next(path: Path, separator: re.Pattern[bytes], target: int) -> int | None:
    """Return the end of the first separator that begins at `target` or later; None: none, or only at the end."""
    with open(path, "rb") as file:
        file.seek(target)
        tail, begin = b"", target
        while data := file.read(CHUNK):
            data = tail + data
            found = separator.search(data)
            if found is not None and found.end() < len(data):
                return begin + found.end()
            keep = min(len(data), 512 if found is None else len(data) - found.start())
            begin += len(data) - keep
            tail = data[len(data) - keep :]
    return None
