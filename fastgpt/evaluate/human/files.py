"""JSONL files that grow by a line at a time, and what identifies a prompt."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastgpt.core.errors import UserError, cause_of

Prompt = str | list[dict[str, str]]


def read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a JSONL file with their line numbers, from 1. A last line that was not written to its end
    is left out.

    Raises:
        UserError: the file cannot be read, or a line is not a JSON object.
    """
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path} cannot be read ({cause_of(e)})") from None
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):
                return
            row = None
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, line {number}: got {line[:40].decode(errors='replace')!r}, expected a JSON object"
            )
        yield number, row


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a line; it is on the disk when this returns. What is left of a line that was not written to its end is
    removed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as f:
        size = f.seek(0, os.SEEK_END)
        if size:
            f.seek(size - 1)
            if f.read(1) != b"\n":
                _end_line(f, path)
        f.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        f.flush()
        os.fsync(f.fileno())


def _end_line(f: Any, path: Path) -> None:
    """End the last line of a file if it is whole, as of one that a person has written; else remove it."""
    f.seek(0)
    kept = f.read()
    last = kept[kept.rfind(b"\n") + 1 :]
    try:
        json.loads(last)
        f.write(b"\n")
    except ValueError:
        f.truncate(len(kept) - len(last))


def prompt_of(row: dict[str, Any], where: str) -> Prompt:
    """Return the prompt of a row: a text, or messages with role and content.

    Raises:
        UserError: it is missing, empty or something else.
    """
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and all(_is_message(m) for m in prompt):
        return [{"role": m["role"], "content": m["content"]} for m in prompt]
    got = "nothing" if prompt is None else f"{prompt!r:.60}"
    raise UserError(f"{where}: prompt is {got}, expected a text or a list of messages with role and content")


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
