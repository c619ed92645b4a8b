"""Document: one text with its identity, the unit that readers yield and every later stage of a build works on."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Document:
    """One text.

    Attributes:
        text: the text; readers yield strict Unicode without NULs and lone surrogates.
        id: stable from run to run: the record's own id where one is declared, else "<file name>#<number>". The number
            is the offset of the record in lines and text, so it does not depend on parts, else its index from 0.
        source: where the text comes from: the path of the file, its URL, or the name of the data set.
        meta: further fields of the record, such as "license" and "title"; all values are text.
    """

    text: str
    id: str
    source: str
    meta: dict[str, str] = field(default_factory=dict)
