"""Formats of a row: from the columns of a file to texts or messages, their labels and their pairs.

The columns are those of TRL, Alpaca and ShareGPT. Which format a file has follows from the columns of its first row.

=============== ============================================== ===================================================
format          columns                                        notes
=============== ============================================== ===================================================
messages        messages [, tools]                             a list of {role, content}
conversations   conversations [, system, tools]                ShareGPT, Vicuna: a list of {from, value}
completion      prompt, completion                             texts, or lists of messages
alpaca          instruction, output [, input, system]          becomes messages of system, user and assistant
text            text                                           plain text; also the files of text formats
preference      [prompt,] chosen, rejected                     texts or lists of messages; without `prompt` it is what
                                                               both sides begin with
rating          prompt, completion, label                      label: true for a good completion, false for a bad one
label           text or prompt; label                          a name or a number of a class, or a number to predict
tags            words or tokens, or text; tags, ner_tags       a label for each word; words of a text are what spaces
                or labels                                      separate
=============== ============================================== ===================================================

The formats of votes by people, of which several rows count together, are in ratings.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastgpt.data.read.rows import Row

ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_call": "assistant", "function_response": "tool",
}  # fmt: skip
KINDS = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
BOOLS = {"true": True, "1": True, "false": False, "0": False}
TAGS = ("tags", "ner_tags", "labels")
Message = dict[str, Any]


class Text(NamedTuple):
    """A prompt, which may be empty, and the text after it."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation. first: the message from which on replies are learned. tools: what the template gets as tools."""

    messages: list[Message]
    first: int = 0
    tools: Any = None


Source = Text | Chat


class Labelled(NamedTuple):
    """A text or, for tags, its words; and its label, or the label of each word."""

    text: str | list[str]
    label: Any


class Wrong(Exception):
    """A defect of a row: kind, problem and remedy as in Row.report."""

    def __init__(self, kind: str, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.kind, self.problem, self.remedy = kind, problem, remedy


class Unused(Exception):
    """The reason why a row without a defect is left out."""


@dataclass
class Reader:
    """Reads the rows of one file in one format."""

    names: dict[str, str] = field(default_factory=dict)  # column of the format -> column of the file

    def value(self, row: Row, name: str) -> Any:
        """Return the value of a column.

        Raises:
            Wrong: it is missing or null.
        """
        column = self.names.get(name, name)
        value = row.fields.get(column)
        if value is None:
            state = "null" if column in row.fields else "missing"
            raise Wrong("missing field", f"field {column!r} is {state}", "add it, or name the column that holds it")
        return value

    def text(self, row: Row, name: str, empty: bool = False) -> str:
        """Return the text of a column; empty: whether it may hold none.

        Raises:
            Wrong: it is missing, empty or not text.
        """
        column = self.names.get(name, name)
        if empty and row.fields.get(column) is None:
            return ""
        return _text(self.value(row, name), column, empty)

    def side(self, row: Row, name: str) -> str | list[Message]:
        """Return a text, or a list of messages."""
        value, column = self.value(row, name), self.names.get(name, name)
        return messages(value, column) if isinstance(value, list) else _text(value, column, name == "prompt")

    def completion(self, row: Row) -> Source:
        """Return a prompt and its completion."""
        return joined(self.side(row, "prompt"), self.side(row, "completion"), self._tools(row))

    def messages(self, row: Row) -> Source:
        """Return a conversation of {role, content}."""
        column = self.names.get("messages", "messages")
        return _answered(Chat(messages(self.value(row, "messages"), column), tools=self._tools(row)), column)

    def conversations(self, row: Row) -> Source:
        """Return a conversation of {from, value}."""
        column, turns = self.names.get("conversations", "conversations"), self.value(row, "conversations")
        system = self.text(row, "system", empty=True)
        found = [{"role": "system", "content": system}] if system else []
        for where, turn in _items(turns, column):
            if "from" not in turn and "role" in turn:  # some files mix both spellings
                found += messages([turn], where)
                continue
            speaker = _text(turn.get("from"), f"{where}.from")
            if speaker not in SPEAKERS:
                raise _unknown_role(f"{where}.from", speaker, SPEAKERS)
            role = SPEAKERS[speaker]
            content = _text(turn.get("value"), f"{where}.value", empty=role in ("system", "tool"))
            found.append({"role": role, "content": content})
        return _answered(Chat(found, tools=self._tools(row)), column)

    def alpaca(self, row: Row) -> Source:
        """Return an instruction, with its input behind a blank line, and the output as a conversation."""
        system, given = self.text(row, "system", empty=True), self.text(row, "input", empty=True)
        asked = self.text(row, "instruction") + (f"\n\n{given}" if given else "")
        turns = [("system", system)] * bool(system) + [("user", asked), ("assistant", self.text(row, "output"))]
        return Chat([{"role": role, "content": content} for role, content in turns])

    def plain(self, row: Row) -> Source:
        """Return a text without a prompt."""
        return Text("", self.text(row, "text"))

    def pair(self, row: Row) -> tuple[Source, Source]:
        """Return the chosen and the rejected side of a prompt."""
        chosen, rejected = self.side(row, "chosen"), self.side(row, "rejected")
        given = self.names.get("prompt", "prompt")
        if type(chosen) is not type(rejected):
            raise Wrong("wrong type", "one side is text, the other a list of messages", "write both in the same way")
        if chosen == rejected:
            raise Wrong("equal sides", "chosen and rejected are equal", "remove the row, or repair one of them")
        prompt = self.side(row, "prompt") if row.fields.get(given) is not None else None
        if prompt is None or isinstance(prompt, str) and isinstance(chosen, list):  # the lists then hold the prompt
            size = _common(chosen, rejected)
            prompt, chosen, rejected = chosen[:size], chosen[size:], rejected[size:]
        for side, name in ((chosen, "chosen"), (rejected, "rejected")):
            if not side:
                raise Wrong("empty completion", f"field {name!r} holds no more than the prompt", "remove the row")
        tools = self._tools(row)
        return joined(prompt, chosen, tools), joined(prompt, rejected, tools)

    def rating(self, row: Row) -> list[tuple[Source, bool]]:
        """Return a completion and whether it is good."""
        value, column = self.value(row, "label"), self.names.get("label", "label")
        if not row.typed and isinstance(value, str):
            value = BOOLS.get(value.strip().lower(), value)
        if not isinstance(value, bool):
            raise Wrong(
                "wrong type", f"field {column!r} is {_kind(value)}, expected true or false", "write true or false"
            )
        return [(self.completion(row), value)]

    def both_ratings(self, row: Row) -> list[tuple[Source, bool]]:
        """Return both sides of a pair: the chosen one is good, the rejected one bad."""
        chosen, rejected = self.pair(row)
        return [(chosen, True), (rejected, False)]

    def label(self, row: Row) -> Labelled:
        """Return a text and its label: text, a number, or true or false as 1 or 0."""
        name = "text" if row.fields.get(self.names.get("text", "text")) is not None else "prompt"
        value, column = self.value(row, "label"), self.names.get("label", "label")
        if isinstance(value, (list, dict)):
            raise Wrong(
                "wrong type", f"field {column!r} is {_kind(value)}, expected text or a number", "write one label"
            )
        return Labelled(self.text(row, name), int(value) if isinstance(value, bool) else value)

    def tags(self, row: Row) -> Labelled:
        """Return words and the label of each."""
        at = {n: self.names.get(n, n) for n in ("words", "tokens", "text", *TAGS)}
        present = [n for n in at if row.fields.get(at[n]) is not None]
        words_in = next((n for n in ("words", "tokens") if n in present), "text")
        words = self.text(row, "text").split() if words_in == "text" else self.value(row, words_in)
        tags = self.value(row, next((n for n in TAGS if n in present), "tags"))
        if not isinstance(tags, list) or not isinstance(words, list):
            raise Wrong("wrong type", "words or tags are not a list", "write a list of words and a list of labels")
        if not words or not all(isinstance(w, str) and w and not w.isspace() for w in words):
            raise Wrong("wrong type", f"field {at[words_in]!r} holds what is not a word", "write a list of words")
        if len(tags) != len(words):
            raise Wrong(
                "wrong length", f"there are {len(words)} words and {len(tags)} labels", "write one for each word"
            )
        return Labelled(words, tags)

    def _tools(self, row: Row) -> Any:
        """Return the tools of a row, which some files hold as the text of JSON."""
        column = self.names.get("tools", "tools")
        tools = row.fields.get(column)
        try:
            return json.loads(tools) if isinstance(tools, str) and tools else tools
        except ValueError:
            raise Wrong("broken JSON", f"field {column!r} is not JSON", "write a list of tools") from None


# kind of data -> format -> columns that it needs, one of each group, and its method of Reader; the first that fits wins
Formats = dict[str, tuple[tuple[tuple[str, ...], ...], Callable[[Reader, Row], Any]]]
EXAMPLES: Formats = {
    "messages": ((("messages",),), Reader.messages),
    "conversations": ((("conversations",),), Reader.conversations),
    "completion": ((("prompt",), ("completion",)), Reader.completion),
    "alpaca": ((("instruction",), ("output",)), Reader.alpaca),
    "text": ((("text",),), Reader.plain),
}
PAIRS: Formats = {"preference": ((("chosen",), ("rejected",)), Reader.pair)}
RATINGS: Formats = {
    "rating": ((("prompt",), ("completion",), ("label",)), Reader.rating),
    "preference": ((("chosen",), ("rejected",)), Reader.both_ratings),
}
LABELS: Formats = {"label": ((("text", "prompt"), ("label",)), Reader.label)}
TAGGED: Formats = {"tags": ((("words", "tokens", "text"), TAGS), Reader.tags)}


def detect(row: Row, formats: Formats, names: dict[str, str]) -> str:
    """Return the format of a row by its columns.

    Raises:
        Wrong: no format fits.
    """
    for name, (groups, _) in formats.items():
        if all(any(names.get(c, c) in row.fields for c in group) for group in groups):
            return name
    wanted = "; ".join(", ".join(" or ".join(g) for g in groups) for groups, _ in formats.values())
    had = ", ".join(map(str, row.fields)) or "none"
    raise Wrong("unknown format", f"the columns are {had}, expected {wanted}", "rename them, or name the columns")


def messages(value: Any, where: str) -> list[Message]:
    """Return checked messages, without fields that are null; a content of parts of text becomes their text.

    Raises:
        Wrong: a field is missing or of the wrong type, a role is unknown, or a reply is empty.
    """
    found = []
    for place, given in _items(value, where):
        turn = {k: v for k, v in given.items() if v is not None}
        role = _text(turn.get("role"), f"{place}.role")
        if role not in ROLES:
            raise _unknown_role(f"{place}.role", role, ROLES)
        content = turn.get("content", "" if turn.get("tool_calls") else None)
        if isinstance(content, list):
            parts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in content]
            content = "".join(_text(p, f"{place}.content[{i}].text", True) for i, p in enumerate(parts))
        turn["content"] = _text(content, f"{place}.content", empty=role != "assistant" or bool(turn.get("tool_calls")))
        found.append(turn)
    return found


def _items(value: Any, where: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the objects of a list, each with its place."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise Wrong("wrong type", f"field {where!r} is {_kind(value)}, expected a list of messages", "write a list")
    if not value:
        raise Wrong("missing field", f"field {where!r} is empty", "remove the row")
    return [(f"{where}[{i}]", turn) for i, turn in enumerate(value)]


def _text(value: Any, where: str, empty: bool = False) -> str:
    if value is None:
        raise Wrong("missing field", f"field {where!r} is missing", "add it")
    if not isinstance(value, str):
        raise Wrong("wrong type", f"field {where!r} is {_kind(value)}, expected text", "write it as text")
    if "\0" in value:
        raise Wrong("NUL", f"field {where!r} holds a NUL", "remove it")
    if not empty and (not value or value.isspace()):
        kind = "empty text" if where.endswith(("text", "prompt", "instruction")) else "empty completion"
        raise Wrong(kind, f"field {where!r} is empty", "fill it, or remove the row")
    return value


def _answered(chat: Chat, where: str) -> Chat:
    if not any(m["role"] == "assistant" for m in chat.messages[chat.first :]):
        raise Wrong("no reply", f"field {where!r} has no message of the assistant", "add a reply, or remove the row")
    return chat


def joined(prompt: str | list[Message], completion: str | list[Message], tools: Any) -> Source:
    """Return a prompt and a completion, both texts or both messages, as one source."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return Text(prompt, completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        problem = "the prompt and the completion are not both text, or both lists of messages"
        raise Wrong("wrong type", problem, "write both in the same way")
    return _answered(Chat([*prompt, *completion], len(prompt), tools), "completion")


def _common(a: Any, b: Any) -> int:
    """Return the length of what two texts, or two lists of messages, begin with; in texts it ends before a space or
    behind a line end, so that no word is cut."""
    if isinstance(a, list):
        return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    size = min(len(os.path.commonprefix([a, b])), len(a) - 1, len(b) - 1)
    while size and not (a[size - 1] == "\n" or a[size].isspace() and b[size].isspace()):
        size -= 1
    return size


def _unknown_role(where: str, role: str, known: Any) -> Wrong:
    return Wrong("unknown role", f"field {where!r} is {role!r}, expected one of {', '.join(known)}", "rename it")


def _kind(value: Any) -> str:
    return "null" if value is None else KINDS.get(type(value), "of another type")
