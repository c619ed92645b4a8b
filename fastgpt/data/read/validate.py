"""The command `fastgpt data validate`: read files as a build would and list every defect."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fastgpt.core.command import Parser, number
from fastgpt.core.errors import UserError
from fastgpt.core.progress import bar
from fastgpt.data.read import NAMES, Defect, Format, find_files, open_documents
from fastgpt.data.read.format import SPLITS


@dataclass
class Validation:
    """What was read, and the defects: how many of each kind, and the first `limit` of them."""

    files: int = 0
    documents: int = 0
    bytes: int = 0
    characters: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    defects: list[Defect] = field(default_factory=list)


def validate(
    patterns: list[str | Path], format: Format, limit: int = 100, progress: Callable[[int, int], Any] | None = None
) -> Validation:
    """Read all files of the patterns in mode "skip" and return what was found.

    Args:
        limit: defects to keep; all are counted.
        progress: called with (bytes read since the last call, bytes of all files).

    Raises:
        UserError: a path does not exist, a format cannot be told, a package is missing.
    """
    format = replace(format, mode="skip")
    result = Validation()

    def note(defect: Defect) -> None:
        result.kinds[defect.kind] += 1
        if len(result.defects) < limit:
            result.defects.append(defect)

    files = []
    for pattern in patterns:
        found = find_files(pattern, format, note)
        files += found.files
        result.skipped += found.skipped
    total = sum(file.size for file in files)

    def advance(size: int) -> None:
        if progress is not None:
            progress(size, total)

    for file in files:
        result.files += 1
        result.bytes += file.size
        for document in open_documents(file, format, note, advance):
            result.documents += 1
            result.characters += len(document.text)
    return result


def add_format_options(parser: ArgumentParser) -> None:
    """Add the options that declare a format."""
    parser.add_argument("--format", default="auto", choices=("auto", *NAMES), help="default: by the name of each file")
    parser.add_argument("--text", nargs="+", default=["text"], metavar="FIELD", help="field with the text")
    parser.add_argument("--id", metavar="FIELD", help="field with the id of a record")
    parser.add_argument("--meta", nargs="*", default=[], metavar="FIELD", help="fields to carry along")
    parser.add_argument("--split", default="document", choices=SPLITS, help="what a document is in text files")
    parser.add_argument("--columns", nargs="*", default=[], metavar="NAME", help="columns of a csv without a header")
    parser.add_argument("--delimiter", default=",", metavar="CHARACTER", help="between the columns of csv (default: ,)")
    about = "size of the largest record, in bytes (default: 64 MiB)"
    parser.add_argument("--max-bytes", type=number(int, 1), default=64 << 20, metavar="N", help=about)


def format_of_options(args: Namespace) -> Format:
    """Return the format that the options declare. Raises UserError for settings that are wrong."""
    return Format(
        args.format, tuple(args.text), args.id, tuple(args.meta), split=args.split, columns=tuple(args.columns),
        delimiter=args.delimiter, max_bytes=args.max_bytes,
    )  # fmt: skip


def main(argv: list[str]) -> int:
    """Run `fastgpt data validate`; return the exit code: 0 without defects, 1 with some."""
    about = "Read files as a build would, and list every defect. Contents of the files are never printed."
    parser = Parser(prog="fastgpt data validate", description=about)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="files, folders or globs in quotes")
    add_format_options(parser)
    parser.add_argument("--limit", type=number(int, 0), default=100, help="defects to list at most (default: 100)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    args = parser.parse_args(argv)
    bars: list[Any] = []

    def advance(size: int, total: int) -> None:
        if not bars:
            bars.append(bar(total, desc="validate", unit="B", unit_scale=True, leave=False))
        bars[0].update(size)

    try:
        result = validate(args.paths, format_of_options(args), args.limit, advance)
    except UserError as e:
        raise UserError(f"validate: {e}") from None
    finally:
        for shown in bars:
            shown.close()
    count = sum(result.kinds.values())
    if args.json:
        counts = {"skipped": dict(result.skipped), "kinds": dict(result.kinds), "count": count}
        defects = [asdict(defect) for defect in result.defects]
        print(json.dumps({**vars(result), **counts, "defects": defects}, ensure_ascii=False))
    else:
        _print(result, count)
    return 1 if count else 0


def _print(result: Validation, count: int) -> None:
    for defect in result.defects:
        print(defect)
    if count > len(result.defects):
        print(f"... and {count - len(result.defects):,} more (--limit shows more)")
    left = "".join(f", {n:,} {why}" for why, n in sorted(result.skipped.items()))
    read = f"{_counted(result.files, 'file')}, {result.bytes / 1e6:,.1f} MB, {_counted(result.documents, 'document')}"
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in result.kinds.most_common())
    defects = f"{_counted(count, 'defect')} ({kinds})" if count else "no defects"
    print(f"{read}: {defects}{f'; left out{left[1:]}' if left else ''}")


def _counted(count: int, noun: str) -> str:
    """Return a count and its noun: "1 file", "2 files"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
