"""Format: what a file holds and which of its fields are wanted. Types are declared; nothing is guessed from values."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.data.read.defects import MODES, Mode
from fastgpt.data.read.streams import COMPRESSIONS

SUFFIXES = {
    ".txt": "text", ".text": "text", ".md": "markdown", ".markdown": "markdown", ".html": "html", ".htm": "html",
    ".xhtml": "html", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet", ".warc": "warc", ".wet": "wet",
}  # fmt: skip
NAMES = (
    "text", "markdown", "html", "jsonl", "json", "csv", "tsv", "parquet", "warc", "wet", "mediawiki", "stackexchange",
    "pile", "reddit",
)  # fmt: skip
SPLITS = ("document", "paragraph", "line", "piece")
# what a format of a well-known collection means in terms of the others
PRESETS: dict[str, dict[str, Any]] = {
    "pile": {"name": "jsonl", "text": ("text",), "meta": ("meta.pile_set_name",)},
    "reddit": {
        "name": "jsonl", "text": ("body",), "id": "id", "meta": ("subreddit",), "blank": ("[deleted]", "[removed]"),
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Format:
    """What a file holds, which fields are wanted, and what to do about defects.

    Attributes:
        name: one of NAMES, or "auto": by the suffix of each file.
        text: the field with the text, or several that are joined by a blank line. A dot reaches into an object:
            "post.body". For formats with records: jsonl, json, csv, tsv, parquet.
        id: the field with the record's own id; None: "<file name>#<n>", see Document.
        meta: fields to carry along as text, under their own names; a missing one is left out.
        mode: "fail" raises at the first defect; "skip" leaves out what is defective; "replace" writes U+FFFD for bytes
            that are not UTF-8, NULs and lone surrogates, and leaves out what cannot be read at all.
        split: how text and markdown become documents: "document" at `<|endoftext|>`, else the whole file;
            "paragraph" at blank lines; "line"; "piece" at line ends, in pieces of `piece_bytes` or a line more.
        piece_bytes: the size of pieces.
        max_bytes: the largest record, in bytes.
        columns: names of the columns of a csv or tsv file without a header line.
        delimiter: what separates the columns of csv.
        blank: texts that stand for none, such as "[deleted]"; records with them are left out and are no defects.
        license, source: written to the meta of each document whose record has no such field.
    """

    name: str = "auto"
    text: str | tuple[str, ...] = "text"
    id: str | None = None
    meta: tuple[str, ...] = ()
    mode: Mode = "fail"
    split: str = "document"
    piece_bytes: int = 1 << 20
    max_bytes: int = 64 << 20
    columns: tuple[str, ...] = ()
    delimiter: str = ","
    blank: tuple[str, ...] = ()
    license: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        for field, allowed in (("name", ("auto", *NAMES)), ("mode", MODES), ("split", SPLITS)):
            if getattr(self, field) not in allowed:
                raise UserError(f"{field} is {getattr(self, field)!r}, expected one of {', '.join(allowed)}")
        for field in ("text", "meta", "columns", "blank"):
            value = getattr(self, field)
            value = (value,) if isinstance(value, str) else tuple(value)
            if not all(isinstance(v, str) and v for v in value):
                raise UserError(f"{field} is {value!r}, expected names of fields")
            object.__setattr__(self, field, value)
        if not self.text:
            raise UserError("text names no field, expected the field with the text")
        if len(self.delimiter) != 1 or self.delimiter in '"\r\n':
            raise UserError(f"delimiter is {self.delimiter!r}, expected one character")
        for field in ("piece_bytes", "max_bytes"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} is {getattr(self, field)}, expected at least 1")

    @property
    def text_fields(self) -> tuple[str, ...]:
        return (self.text,) if isinstance(self.text, str) else self.text

    def resolved(self, path: Path) -> Format:
        """Return the format for one file: "auto" replaced by the format of its suffix, presets by what they stand for.

        A field that is set here wins over that of the preset.

        Raises:
            UserError: "auto", and no format has this suffix.
        """
        name = self.name
        if name == "auto":
            name = format_of(path) or ""
            if not name:
                known = " ".join(SUFFIXES)
                raise UserError(f"cannot tell the format of {path} from its name: name a format, or one of {known}")
        found = replace(self, name=name)
        if name == "tsv":
            return replace(found, name="csv", delimiter="\t")
        if name == "wet":
            return replace(found, name="warc")
        preset = PRESETS.get(name)
        if preset is None:
            return found
        unset = {f.name for f in fields(Format) if getattr(self, f.name) == getattr(_DEFAULT, f.name)}
        return replace(found, **{k: v for k, v in preset.items() if k in unset or k == "name"})


_DEFAULT = Format()


def format_of(path: Path) -> str | None:
    """Return the format that a file's name states, compression aside; None: no known suffix."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None
