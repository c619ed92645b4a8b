"""Rows of CSV, TSV, JSONL and plain files, each with its line; what is wrong is said with file, line, key and what was
expected."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fastgpt.core.errors import UserError, cause_of
from fastgpt.evaluate.json_lines import read_objects


@dataclass(frozen=True)
class Row:
    """A row of a file: its values by key, and its line, counted from 1."""

    path: Path
    line: int
    values: dict[str, Any]

    def wrong(self, key: str, expected: str) -> NoReturn:
        """Raise UserError on the value of a key."""
        value = self.values.get(key)
        found = f"{key} is missing" if value is None else f"{key} is {value!r:.60}"
        raise UserError(f"{self.path}:{self.line}: {found}, expected {expected}")

    def text(self, key: str) -> str:
        """Return a text that is not blank. Raises UserError."""
        value = self.values.get(key)
        if not isinstance(value, str) or not value.strip():
            self.wrong(key, "a text")
        return value

    def one_of(self, key: str, *choices: Any) -> Any:
        """Return a value that is one of the choices. Raises UserError."""
        value = self.values.get(key)
        if value not in choices or isinstance(value, bool) != isinstance(choices[0], bool):
            self.wrong(key, " or ".join(map(json.dumps, choices)))
        return value


def read_table(path: Path, columns: tuple[str, ...], tabs: bool = False) -> list[Row]:
    """Return the rows of a CSV file, or of one with tabs and without quotes; the first line names the columns.

    Raises:
        UserError: the file cannot be read, has no rows, lacks a column, or a row has another number of cells.
    """
    with _opened(path) as lines:
        options: dict[str, Any] = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else {}
        reader = csv.reader(lines, **options)
        head = next(reader, [])
        if missing := [c for c in columns if c not in head]:
            raise UserError(f"{path}:1: no column {missing[0]!r}, expected the columns {', '.join(columns)}")
        rows = []
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(head):
                raise UserError(f"{path}:{reader.line_num}: {len(cells)} cells, expected {len(head)}")
            rows.append(Row(path, reader.line_num, dict(zip(head, cells))))
    return _some(path, rows)


def read_jsonl(path: Path) -> list[Row]:
    """Return the rows of a JSONL file.

    Raises:
        UserError: the file cannot be read, has no rows, or a line is not a JSON object.
    """
    return _some(path, [Row(path, number, values) for number, values in read_objects(path)])


def read_lines(path: Path) -> list[Row]:
    """Return the lines of a text file as rows with the key "text", without blank lines and those that begin with #.

    Raises:
        UserError: the file cannot be read, or has no such lines.
    """
    with _opened(path) as lines:
        stripped = [(n, line.strip()) for n, line in enumerate(lines, 1)]
    return _some(path, [Row(path, n, {"text": line}) for n, line in stripped if line and not line.startswith("#")])


@contextmanager
def _opened(path: Path) -> Iterator[Iterator[str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            yield lines
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path} cannot be read ({cause_of(e)}), expected a text file in UTF-8") from None


def _some(path: Path, rows: list[Row]) -> list[Row]:
    if not rows:
        raise UserError(f"{path} has no rows, expected at least one")
    return rows
