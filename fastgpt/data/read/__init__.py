"""From files to documents: formats, compression, defects, parts.

    for document in open_documents("data.jsonl.gz", Format(text="body", id="url")):
        ...

Each format has a reader: a function from a Reading to documents. All of them read in bounded memory, check what they
read, and report each defect with its line and byte.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.data.document import Document
from fastgpt.data.read.defects import MODES, Defect, DefectError, Mode, OnDefect
from fastgpt.data.read.files import Files, SourceFile, find_files
from fastgpt.data.read.format import NAMES, Format, format_of
from fastgpt.data.read.parts import Part, parts_of
from fastgpt.data.read.reading import Reading

__all__ = [
    "MODES",
    "NAMES",
    "Defect",
    "DefectError",
    "Files",
    "Format",
    "Mode",
    "OnDefect",
    "Part",
    "SourceFile",
    "find_files",
    "format_of",
    "open_documents",
    "parts_of",
    "read_all",
]

# format -> module and function of its reader
READERS = {
    "text": "text.read_text",
    "markdown": "text.read_text",
    "html": "html.read_html",
    "jsonl": "jsonl.read_jsonl",
    "json": "jsonl.read_json",
    "csv": "tables.read_csv",
    "parquet": "tables.read_parquet",
    "warc": "warc.read_warc",
    "mediawiki": "xml.read_mediawiki",
    "stackexchange": "xml.read_stackexchange",
}


def open_documents(
    path: str | Path | SourceFile | Part,
    format: Format | None = None,
    on_defect: OnDefect | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Iterator[Document]:
    """Yield the documents of one file, or of one part of it, in their order.

    Args:
        on_defect: called with each defect; what happens then is up to format.mode.
        progress: called with the number of bytes read from the file, after each read.

    Raises:
        UserError: mode "fail" and a defect (then a DefectError), a format that cannot be told, a missing package.
    """
    format = format or Format()
    if isinstance(path, (str, Path)):
        reading = Reading(Path(path), format.resolved(Path(path)), on_defect, progress=progress)
    elif isinstance(path, SourceFile):
        reading = Reading(path.path, format.resolved(path.path), on_defect, path.name, progress=progress)
    else:
        span = (path.start, path.stop)
        reading = Reading(path.path, format.resolved(path.path), on_defect, path.name, *span, progress=progress)
    module, _, function = READERS[reading.format.name].partition(".")
    reader = getattr(importlib.import_module(f"fastgpt.data.read.{module}"), function)
    try:
        yield from reader(reading)
    except PermissionError:
        problem, remedy = "the file may not be read (no permission)", f"run chmod +r {reading.file}"
        reading.report("no permission", problem, remedy, None)
    except IsADirectoryError:
        raise UserError(f"cannot read {reading.file}: it is a folder, expected a file") from None
    except OSError as e:
        reading.report("unreadable", f"the file cannot be read ({e.strerror or e})", "check the disk", None)


def read_all(
    pattern: str | Path,
    format: Format | None = None,
    on_defect: OnDefect | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Iterator[Document]:
    """Yield the documents of a file, folder or glob: open_documents of each of find_files."""
    for file in find_files(pattern, format, on_defect).files:
        yield from open_documents(file, format, on_defect, progress)
