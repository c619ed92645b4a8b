"""Fields: from a record to a document, with the types that the format declares."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fastgpt.data.document import Document
from fastgpt.data.read.reading import Reading

KINDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
_ABSENT = object()


class Fields:
    """Takes the declared fields out of records, as they are in the file: no type is changed by way of another.

    Numbers in `id` and `meta` keep their digits; `text` must be text.
    """

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.text = [(name, _getter(name)) for name in reading.format.text_fields]
        self.others = [(name, _getter(name)) for name in reading.format.meta]
        self.id = None if reading.format.id is None else (reading.format.id, _getter(reading.format.id))

    def document(
        self, record: dict[str, Any], number: int, byte: int, exact: Callable[[], Any] | None = None
    ) -> Document | None:
        """Return a record's document; None, with a report, if a field is missing, of the wrong type, or blank.

        Args:
            number: of the record, for its id unless a field is declared.
            exact: returns the record with its numbers as text, as they are written.
        """
        texts = []
        for name, get in self.text:
            value = get(record)
            if type(value) is not str:
                self._wrong(name, value, byte, "text")
                return None
            text = self.reading.strict(value, byte) if "\0" in value else value
            if text is None:
                return None
            texts.append(text)
        meta: dict[str, str] = {}
        own = None
        if self.id is not None:
            own = self._plain(*self.id, record, byte, exact)
            if own is None:
                value = self.id[1](record)
                if value is None or value is _ABSENT:
                    self._wrong(self.id[0], value, byte, "text or a number")
                return None
        for name, get in self.others:
            value = get(record)
            if value is _ABSENT or value is None:
                continue
            plain = self._plain(name, get, record, byte, exact)
            if plain is None:
                return None
            meta[name] = plain
        text = texts[0] if len(texts) == 1 else "\n\n".join(t for t in texts if t)
        return self.reading.document(text, number, byte, own, meta)

    def _plain(
        self, name: str, get: Callable[[Any], Any], record: Any, byte: int, exact: Callable[[], Any] | None
    ) -> str | None:
        """Return a field of `id` or `meta` as text; None, with a report, if it is an object or a list or not clean."""
        value = get(record)
        if type(value) is float:
            value = value if exact is None else get(exact())
        if value is None or value is _ABSENT:
            return None
        if isinstance(value, str):
            return self.reading.strict(value, byte) if "\0" in value else value
        if isinstance(value, (dict, list)):
            self._wrong(name, value, byte, "text or a number")
            return None
        return json.dumps(value)

    def _wrong(self, name: str, value: Any, byte: int, expected: str) -> None:
        if value is _ABSENT or value is None:
            problem = f"field {name!r} is {'missing' if value is _ABSENT else 'null'}"
            self.reading.report("missing field", problem, f"add it, or declare the field that holds {expected}", byte)
            return
        problem = f"field {name!r} is {KINDS.get(type(value), 'of another type')}, expected {expected}"
        remedy = f"name a field inside it, as in {name}.NAME" if isinstance(value, dict) else f"write it as {expected}"
        self.reading.report("wrong type", problem, remedy, byte)


def _getter(name: str) -> Callable[[Any], Any]:
    """Return a function that gets a field of a record; a dot reaches into an object unless a field has that name."""
    path = name.split(".")

    def get(record: Any) -> Any:
        value = record.get(name, _ABSENT)
        if value is not _ABSENT or len(path) == 1:
            return value
        value = record
        for key in path:
            value = value.get(key, _ABSENT) if type(value) is dict else _ABSENT
        return value

    return get
