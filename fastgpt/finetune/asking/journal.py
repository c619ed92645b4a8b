"""A file of records that a later call continues: one row a line, after a line with what the records depend on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from fastgpt.core.errors import UserError, cause_of


class Journal:
    """Records, each written as soon as it is there. A line that an interruption cut off is dropped.

    Args:
        path: the file; it is made if it is missing.
        made_by: what the records depend on: models, settings, fingerprints.

    Attributes:
        records: those that are written.

    Raises:
        UserError: the file is damaged or cannot be written, or its records were made by something else.
    """

    def __init__(self, path: Path, made_by: dict[str, Any]) -> None:
        self.path, self.records = path, list[dict[str, Any]]()
        head = json.dumps({"made_by": made_by}, sort_keys=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = path.read_bytes() if path.exists() else b""
            size = whole.rfind(b"\n") + 1
            if size:
                self._read(whole[:size].decode(), made_by)
            self._file = path.open("r+b" if path.exists() else "wb")
            self._file.truncate(size)
            self._file.seek(size)
            if not size:
                self._write(head)
        except OSError as e:
            raise UserError(f"{path} could not be written ({cause_of(e)})") from e

    def _read(self, text: str, made_by: dict[str, Any]) -> None:
        try:
            head, *rows = map(json.loads, text.removesuffix("\n").split("\n"))
            before = head["made_by"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.path} is damaged, expected a row of JSON in each line") from None
        now = json.loads(json.dumps(made_by))
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if changed:
            raise UserError(
                f"{self.path} was begun with another {', '.join(changed)}; expected the same, or remove the file"
            )
        self.records = rows

    def _write(self, line: str) -> None:
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def add(self, record: dict[str, Any]) -> None:
        """Write a record."""
        self._write(json.dumps(record, ensure_ascii=False))
        self.records.append(record)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines; the file appears complete or not at all.

    Raises:
        UserError: it cannot be written.
    """
    aside = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        os.replace(aside, path)
    except OSError as e:
        aside.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({cause_of(e)})") from e
