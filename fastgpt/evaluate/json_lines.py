"""Read JSON lines: an object on each line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastgpt.core.errors import UserError, cause_of


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of each line that is not blank, counted from 1, and its object.

    Raises:
        UserError: the file cannot be read as UTF-8, or a line is not a JSON object.
    """
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _object(f"{path}:{number}", line)
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} cannot be read ({cause_of(e)}), expected JSON lines in UTF-8") from None


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as e:
        raise UserError(f"{where} is not JSON ({e}), expected an object on each line") from None
    if not isinstance(values, dict):
        raise UserError(f"{where} is {line.strip()[:40]!r}, expected a JSON object")
    return values
