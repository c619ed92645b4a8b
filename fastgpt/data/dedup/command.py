"""The command `fastgpt data dedup`: the documents of .jsonl files without their duplicates."""

from __future__ import annotations

import json
import os
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np

from fastgpt.core.command import Parser, number
from fastgpt.core.errors import UserError
from fastgpt.data.dedup.find import find
from fastgpt.data.dedup.fingerprint import fingerprint
from fastgpt.data.dedup.ngrams import Contamination, NgramIndex
from fastgpt.data.dedup.parts import DedupPart
from fastgpt.data.dedup.result import Duplicates
from fastgpt.data.dedup.settings import DedupSettings, Keep

PART = 1 << 26  # bytes of a part


@dataclass(slots=True)
class _Lines:
    """Non-empty lines of a file, by their first byte."""

    path: Path
    key: str
    starts: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    def read(self, rows: np.ndarray) -> list[bytes]:
        with self.path.open("rb") as file:
            return [(file.seek(self.starts[row]), file.readline())[1] for row in rows]

    def texts(self, rows: np.ndarray) -> list[str]:
        return [self._text(line, self.numbers[row]) for row, line in zip(rows, self.read(rows))]

    def _text(self, line: bytes, number: int) -> str:
        try:
            text = json.loads(line)[self.key]
        except (ValueError, TypeError, KeyError, IndexError):
            text = None
        if not isinstance(text, str):
            raise UserError(f"dedup: {self.path}:{number}: expected a JSON object with text in the field {self.key!r}")
        return text


def main(argv: list[str]) -> int:
    """Run `fastgpt data dedup`."""
    about = "Write the documents of .jsonl files without duplicates; of each cluster one stays, its line unchanged."
    parser = Parser(prog="fastgpt data dedup", description=about)
    parser.add_argument("files", nargs="+", metavar="FILE", help=".jsonl files, one document a line")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .jsonl file to write")
    parser.add_argument("--text", default="text", metavar="FIELD", help="field that holds the text (default: text)")
    about = "similarity of near-duplicates (default: 0.8)"
    parser.add_argument("--threshold", type=number(float, 0, 1, open_least=True), default=0.8, help=about)
    parser.add_argument("--exact", action="store_true", help="drop equal documents only")
    parser.add_argument("--keep", default="first", choices=get_args(Keep)[:2], help="which one stays (default: first)")
    about = "drop documents that share 13 words in a row with this evaluation file; may be repeated"
    parser.add_argument("--against", action="append", default=[], metavar="FILE", help=about)
    args = parser.parse_args(argv)
    settings = DedupSettings(near=not args.exact, threshold=args.threshold, keep=args.keep)
    index = NgramIndex.from_files(args.against) if args.against else None
    with tempfile.TemporaryDirectory() as folder:
        lines: dict[str, _Lines] = {}
        parts = []
        for i, part in enumerate(_parts_of(args)):
            stem = Path(folder) / f"{i:09}"
            fingerprint(part.texts(np.arange(len(part.starts))), settings).save(stem)
            lines[stem.name] = part
            parts.append(DedupPart(stem.name, str(part.path), "train", stem))
        found = find(parts, lambda part, rows: lines[part.name].texts(rows), settings, Path(folder))
        report = _write(Path(args.out), parts, lines, found, index)
    _print(found, sum(len(part.starts) for part in lines.values()), report)
    return 0


def _parts_of(args: Namespace) -> Iterator[_Lines]:
    for name in args.files:
        part = _Lines(Path(name), args.text)
        position = 0
        try:
            with part.path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        part.starts.append(position)
                        part.numbers.append(number)
                    position += len(line)
                    if part.starts and position - part.starts[0] >= PART:
                        yield part
                        part = _Lines(Path(name), args.text)
        except OSError as e:
            raise UserError(f"dedup: cannot read {name}: {e.strerror}") from None
        yield part


def _write(
    path: Path, parts: list[DedupPart], lines: dict[str, _Lines], found: Duplicates, index: NgramIndex | None
) -> Contamination:
    """Write the lines that stay aside, and rename the file when it is complete."""
    report = Contamination()
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            for part in parts:
                rows = np.flatnonzero(found.keep(part))
                if index:
                    cleaned, counts = index.clean(lines[part.name].texts(rows))
                    rows = rows[[text is not None for text in cleaned]]
                    report.add(counts)
                file.writelines(line.rstrip(b"\r\n") + b"\n" for line in lines[part.name].read(rows))
        aside.replace(path)
    except OSError as e:
        raise UserError(f"dedup: cannot write {path}: {e.strerror}") from None
    finally:
        aside.unlink(missing_ok=True)
    return report


def _print(found: Duplicates, documents: int, report: Contamination) -> None:
    exact, near = (sum(getattr(c, kind) for c in found.counts.values()) for kind in ("exact", "near"))
    empty = sum(found.empty.values())
    stay = documents - exact - near - empty - report.dropped
    print(f"{stay:,} of {documents:,} documents stay: dropped {exact:,} equal, {near:,} similar, {empty:,} empty")
    for (dropped, kept), counts in sorted(found.counts.items()):
        print(f"  {dropped} duplicates {kept}: {counts.exact:,} equal, {counts.near:,} similar")
    for name, count in sorted(report.documents.items()):
        print(f"  {count:,} dropped because of {name}")
