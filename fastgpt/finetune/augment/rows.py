"""Sources as rows and back, in one form whatever columns the file has: what the steps of an augmentation change.

Text      {"prompt": ..., "completion": ...}, or {"text": ...}
Chat      {"messages": [...]}, or {"prompt": [...], "completion": [...]} if only the end is learned; tools
pair      {"prompt": ..., "chosen": ..., "rejected": ...}
rating    {"prompt": ..., "completion": ..., "label": true}
Labelled  {"text": ..., "label": ...} or {"tokens": [...], "tags": [...]}
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, cast

from fastgpt.data.read.rows import Row
from fastgpt.finetune.formats import (
    EXAMPLES,
    LABELS,
    PAIRS,
    RATINGS,
    TAGGED,
    Chat,
    Formats,
    Labelled,
    Reader,
    Source,
    Text,
    detect,
)

Fields = dict[str, Any]
FORMATS: dict[str, Formats] = {
    **dict.fromkeys(("sft", "distil"), EXAMPLES),
    **dict.fromkeys(("dpo", "orpo", "reward"), PAIRS),
    "kto": RATINGS,
    **dict.fromkeys(("classify", "regress"), LABELS),
    "tag": TAGGED,
}
TEXTS = ("text", "prompt", "completion", "chosen", "rejected", "messages", "tokens")  # keys with text to change


def row_of(source: Any) -> Fields:
    """Return what a format made of a row as a row."""
    if isinstance(source, Labelled):
        words = isinstance(source.text, list)
        return {"tokens" if words else "text": source.text, "tags" if words else "label": source.label}
    if isinstance(source, Text) and not source.prompt:
        return {"text": source.completion}
    if isinstance(source, Chat) and not source.first:
        return {"messages": source.messages, **_tools(source)}
    if isinstance(source, (Text, Chat)):
        return {"prompt": _prompt(source), "completion": _end(source), **_tools(source)}
    if isinstance(source, list) and len(source) == 1:
        rated, good = source[0]
        return {"prompt": _prompt(rated), "completion": _end(rated), "label": good, **_tools(rated)}
    chosen, rejected = (side for side, _ in source) if isinstance(source, list) else source
    return {"prompt": _prompt(chosen), "chosen": _end(chosen), "rejected": _end(rejected), **_tools(chosen)}


def source_of(fields: Fields, task: str) -> Any:
    """Return what a row stands for.

    Raises:
        Wrong: it has a defect.
    """
    row = Row(fields, True, cast(Any, None), 0)
    formats = FORMATS[task]
    return formats[detect(row, formats, {})][1](Reader(), row)


def _prompt(source: Source) -> Any:
    return source.prompt if isinstance(source, Text) else source.messages[: source.first]


def _end(source: Source) -> Any:
    return source.completion if isinstance(source, Text) else source.messages[source.first :]


def _tools(source: Source) -> Fields:
    return {"tools": source.tools} if isinstance(source, Chat) and source.tools is not None else {}


def changed(fields: Fields, change: Callable[[str], str]) -> Fields:
    """Return a row with every text changed; labels, tags, roles and tools stay."""

    def of(value: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, dict):
            return {**value, "content": change(value["content"])}
        return [of(item) for item in value]

    return {key: of(value) if key in TEXTS else value for key, value in fields.items()}


def asked(fields: Fields) -> str:
    """Return the text of a row that a paraphrase may replace: its prompt, or the last message of the user before the
    last reply; of texts alone, the text."""
    place, key = _asked(fields)
    text: str = place[key]
    return text


def with_asked(fields: Fields, text: str) -> Fields:
    """Return a row with another text in place of `asked`."""
    new = json.loads(json.dumps(fields))
    place, key = _asked(new)
    place[key] = text
    return cast(Fields, new)


def answer(fields: Fields) -> str:
    """Return the text that is the answer of a row; empty if it has none."""
    found = fields.get("completion") or fields.get("chosen") or fields.get("messages") or fields.get("label")
    if isinstance(found, list):
        return str(next(m["content"] for m in reversed(found) if m["role"] == "assistant")).strip()
    return found.strip() if isinstance(found, str) else ""


def _asked(fields: Fields) -> tuple[Any, str]:
    """Return the mapping that holds the text which is asked, and its key there."""
    found = fields.get("messages", fields.get("prompt"))
    if not isinstance(found, list):
        return fields, "prompt" if found is not None else "text"
    last = max((i for i, m in enumerate(found) if m["role"] == "assistant"), default=len(found))
    before = found if "prompt" in fields else found[:last]
    of_user = [m for m in before if m["role"] == "user"]
    return (of_user or before or found)[-1], "content"
