"""Flags for texts: word lists, and regular expressions that take time linear in the text. A text may come in pieces.

While a text grows, a flag is found when nothing that follows can undo it: the character after the match is there, so a
word is known to end. Each scan reads what is new and a window before it; a longer match is found at the end, where the
whole text is read once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fastgpt.core.errors import UserError
from fastgpt.evaluate.safety.files import read_lines
from fastgpt.evaluate.safety.words import Words, last_border

WINDOW = 1000  # characters before new text in which a match of a pattern may begin


class Progress(NamedTuple):
    """How far a text has been read: its characters at the last scan, its last border then, and its last border now."""

    seen: int
    cleared: int
    border: int


class Flag(Protocol):
    """A named test of texts."""

    name: str

    def found(self, text: str) -> bool:
        """Return whether a whole text has the flag."""

    def found_so_far(self, text: str, progress: Progress) -> bool:
        """Return whether a text has the flag whatever follows, looking only at what is new."""


class WordFlag:
    """Words and phrases of a list, as fastgpt.evaluate.safety counts them.

    Args:
        path: a text file with a word or phrase on each line; lines that begin with # are comments.

    Raises:
        UserError: the file cannot be read or has no words.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.words = Words([row.values["text"] for row in read_lines(path)])
        if not self.words.terms:
            raise UserError(f"{path} has no words, expected at least one")
        self._window = 4 * len(self.words.terms[0]) + 16  # a term may have more characters before it is normalised

    def found(self, text: str) -> bool:
        return self.words.count(text) > 0

    def found_so_far(self, text: str, progress: Progress) -> bool:
        if progress.border == progress.cleared:
            return False
        start = max(0, progress.cleared - self._window)
        if start:  # a word must not seem to begin where the window does
            start = last_border(text[max(0, start - WINDOW) : start + 1]) + max(0, start - WINDOW)
        return self.words.count(text[start : progress.border]) > 0


class PatternFlag:
    """Regular expressions in the syntax of RE2, which has no backtracking, so that none can stall the server.

    Args:
        path: a text file with an expression on each line; lines that begin with # are comments.

    Raises:
        UserError: google-re2 is missing, the file cannot be read, or an expression is not one of RE2.
    """

    def __init__(self, name: str, path: Path) -> None:
        try:
            import re2
        except ImportError:
            raise UserError("--flag-patterns needs google-re2, expected `pip install fastgpt[serve]`") from None
        options = re2.Options()
        options.log_errors = False
        options.never_capture = True  # groups are not needed, and slow
        self.name = name
        texts = list[str]()
        for row in read_lines(path):
            texts.append(row.values["text"])
            try:
                re2.compile(texts[-1], options=options)
            except re2.error as e:
                why = e.args[0].decode(errors="replace") if isinstance(e.args[0], bytes) else e
                raise UserError(
                    f"{path}:{row.line}: {texts[-1]!r:.80} is not a regular expression of RE2 ({why:.80})"
                ) from None

        def compiled(form: str) -> list[Any]:
            try:  # one automaton for all
                return [re2.compile(form.format("|".join(f"(?:{text})" for text in texts)), options=options)]
            except re2.error:  # which would be too large
                return [re2.compile(form.format(text), options=options) for text in texts]

        # an expression; with a character behind it; and with one before it, too, so that ^ matches no window's start
        self._whole, self._first, self._later = map(compiled, ("{}", "(?:{})(?s:.)", "(?s:.)(?:{})(?s:.)"))

    def found(self, text: str) -> bool:
        text = _encodable(text)
        return any(p.search(text) for p in self._whole)

    def found_so_far(self, text: str, progress: Progress) -> bool:
        start = max(0, progress.seen - WINDOW)
        part = _encodable(text[start:])
        return any(p.search(part) for p in (self._later if start else self._first))


class Scan:
    """The flags of one text that comes in pieces.

    Attributes:
        text: what has come.
        found: names of the flags, in the order in which they were found.
        clear: characters of the text of which it is certain that no match lies within them, unless one was found.
    """

    def __init__(self, flags: Sequence[Flag]) -> None:
        self.text, self.found, self.clear = "", list[str](), 0
        self._left = list(flags)

    def push(self, text: str) -> list[str]:
        """Append a piece; return the names of the flags that are certain now, whatever follows."""
        seen = len(self.text)
        self.text += text
        # a border needs the character after it, so the place where the text ended is looked at now
        looked = max(0, seen - 1)
        border = last_border(self.text[looked:])
        progress = Progress(seen, self.clear, looked + border if border else self.clear)
        self.clear = progress.border
        return self._add([f for f in self._left if f.found_so_far(self.text, progress)])

    def end(self) -> list[str]:
        """End the text; return the names of the flags that are new."""
        self.clear = len(self.text)
        return self._add([f for f in self._left if f.found(self.text)])

    def _add(self, flags: list[Flag]) -> list[str]:
        self._left = [f for f in self._left if f not in flags]
        names = [f.name for f in flags]
        self.found += names
        return names


def _encodable(text: str) -> str:
    """Return a text with ? for lone surrogates, which RE2 cannot read."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
