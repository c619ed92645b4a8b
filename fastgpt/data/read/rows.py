"""Rows: whole records of a file with all their fields, for data that is more than one text a record."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.data.read import open_documents
from fastgpt.data.read.defects import OnDefect
from fastgpt.data.read.files import SourceFile
from fastgpt.data.read.format import Format
from fastgpt.data.read.jsonl import Records, json_values
from fastgpt.data.read.lines import line_blocks
from fastgpt.data.read.reading import Reading
from fastgpt.data.read.tables import csv_records, parquet_records


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file.

    Attributes:
        fields: values by name, with the types of the file.
        typed: whether the file has types; the cells of csv are text.
        reading, byte: the place of the record, for `report`.
    """

    fields: dict[str, Any]
    typed: bool
    reading: Reading
    byte: int

    def report(self, kind: str, problem: str, remedy: str) -> None:
        """Report a defect of the row while it is the last that was read; in mode "fail" this raises DefectError."""
        self.reading.report(kind, problem, remedy, self.byte)


def open_rows(file: SourceFile, format: Format | None = None, on_defect: OnDefect | None = None) -> Iterator[Row]:
    """Yield the rows of one file of `find_files`, in their order: records of jsonl, json, csv, tsv and parquet. Of
    other formats each document is a row with the one field "text".

    Args:
        on_defect: called with each defect; in mode "skip" the row is left out.

    Raises:
        UserError: mode "fail" and a defect (then a DefectError), a format that cannot be told, a missing package.
    """
    format = (format or Format()).resolved(file.path)
    reading = Reading(file.path, format, on_defect, file.name)
    try:
        if format.name == "jsonl":
            yield from _jsonl(reading)
        elif format.name == "json":
            records = Records(reading)
            for at, raw in json_values(reading):
                if (record := records.record(raw, at)) is not None:
                    yield Row(record, True, reading, at)
        elif format.name == "csv":
            for _, at, cells in csv_records(reading):
                yield Row(dict(cells), False, reading, at)
        elif format.name == "parquet":
            for _, record in parquet_records(reading):
                yield Row(record, True, reading, 0)
        else:
            for document in open_documents(file, format, on_defect):
                yield Row({"text": document.text}, True, reading, 0)
    except OSError as e:
        raise UserError(f"cannot read {reading.file}: {e.strerror or e}") from None


def _jsonl(reading: Reading) -> Iterator[Row]:
    records = Records(reading)
    for at, lines in line_blocks(reading):
        for line in lines:
            if line and not line.isspace() and (record := records.record(line, at)) is not None:
                yield Row(record, True, reading, at)
            at += len(line) + 1
