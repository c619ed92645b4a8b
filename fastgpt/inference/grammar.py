"""What a text must be: a JSON schema, a regular expression, a list of choices, or a grammar in Lark's notation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["json_schema", "json_object", "regex", "choice", "lark"]
LONGEST = 1 << 15  # characters of a grammar; compiling one takes a tenth of a second at most


@dataclass(frozen=True)
class Grammar:
    """What a text must be.

    Attributes:
        kind: "json_schema": an object of JSON that a schema describes; "json_object": any object; "regex": a text that
            a regular expression matches from its beginning to its end; "choice": one of several texts; "lark": a text
            of a grammar in llguidance's variant of Lark.
        text: the schema, expression or grammar; for "choice" a JSON list of texts; empty for "json_object".

    Raises:
        ValueError: names what is wrong. A text that cannot be compiled is found when it is compiled (matcher.py).
    """

    kind: Kind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"Grammar: kind is {self.kind!r}, expected one of {', '.join(get_args(Kind))}")
        if len(self.text) > LONGEST:
            raise ValueError(f"Grammar: the text has {len(self.text):,} characters, expected at most {LONGEST:,}")
        if self.kind == "json_object" and self.text:
            raise ValueError("Grammar: json_object has a text, expected none (json_schema has one)")
        if self.kind == "choice" and not self.choices:
            raise ValueError("Grammar: choice has no texts, expected a JSON list of them")

    @classmethod
    def of_choices(cls, texts: Sequence[str]) -> Grammar:
        """Return the grammar of one of several texts."""
        return cls("choice", json.dumps(list(texts)))

    @property
    def choices(self) -> list[str]:
        """The texts of "choice"; none if `text` is no JSON list of texts."""
        try:
            found = json.loads(self.text)
        except (ValueError, RecursionError):
            return []
        return found if isinstance(found, list) and all(isinstance(one, str) for one in found) else []
