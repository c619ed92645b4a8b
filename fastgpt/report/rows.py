"""Read the rows of a run's metrics.jsonl, of which the last may be half written and the file may grow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Tail:
    """The rows of a JSON Lines file that another process may append to, or replace when a run resumes.

    Attributes:
        damaged: complete lines that are not rows; they are skipped.
        half: whether the file ends within a line. It is read again by the next call.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.damaged, self.half = path, 0, False
        self._offset, self._inode = 0, -1

    def replaced(self) -> bool:
        """Return whether the file is another one than was read, or has become shorter; `read` then begins at its
        start."""
        try:
            stat = self.path.stat()
        except OSError:
            return False
        other = self._inode not in (-1, stat.st_ino) or stat.st_size < self._offset
        if other:
            self._offset, self.damaged = 0, 0
        self._inode = stat.st_ino
        return other

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the rows since the last call, without keeping them; none if there is no file."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self._offset)
            self.half = False
            for line in file:
                self.half = not line.endswith(b"\n")
                if self.half:
                    return
                self._offset += len(line)
                row = _row(line)
                if row is None:
                    self.damaged += 1
                else:
                    yield row


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    right = isinstance(row, dict) and isinstance(row.get("step"), int)
    return row if right else None


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; {} if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
