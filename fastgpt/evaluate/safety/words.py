"""Count the words and phrases of a list in texts: whole words, in any script, without regard to case and width.

A word's neighbours are no letters, marks or digits. Scripts that are written without blanks between words have no such
borders: a term that begins (or ends) with one of their characters may follow (or precede) anything.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

# Thai, Lao, Myanmar, Khmer, kana, Han with their extensions, and Tibetan
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)


def normal(text: str) -> str:
    """Return a text with compatible characters made equal, case folded, and one blank for all white space."""
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


class Words:
    """A list of words and phrases."""

    def __init__(self, terms: Sequence[str]) -> None:
        self.terms = sorted({normal(term) for term in terms} - {""}, key=len, reverse=True)  # the longest first
        self._pattern = re.compile(f"(?={_alternatives(self.terms)})" if self.terms else "(?!)")
        self._begin: dict[str, list[str]] = {}  # terms by their first two characters, the longest first
        for term in self.terms:
            self._begin.setdefault(term[:2], []).append(term)

    def count(self, text: str) -> int:
        """Return how many terms are in a text; one within another is not counted again."""
        text, found, end = normal(text), 0, 0
        for match in self._pattern.finditer(text):
            at = match.start()
            if at < end:
                continue
            terms = self._begin.get(text[at : at + 2], []) + self._begin.get(text[at], [])
            fits = [t for t in terms if text.startswith(t, at) and _whole(text, at, at + len(t))]
            if fits:
                found, end = found + 1, at + len(fits[0])
        return found


def last_border(text: str) -> int:
    """Return the last place before the end of a text where a word ends whatever may follow the text; 0 if there is
    none."""
    for at in range(len(text) - 1, 0, -1):
        before, after = unicodedata.normalize("NFKC", text[at - 1]), unicodedata.normalize("NFKC", text[at])
        if _kind(after[0]) != "M" and not _joined(before[-1], after[0]):
            return at
    return 0


def _alternatives(terms: Sequence[str]) -> str:
    """Return a regular expression for terms that shares what they begin with, so that it is fast for many of them."""
    by_first: dict[str, list[str]] = {}
    for term in filter(None, terms):
        by_first.setdefault(term[0], []).append(term[1:])
    parts = [re.escape(first) + _alternatives(rest) for first, rest in by_first.items()]
    if not parts:
        return ""
    return f"(?:{'|'.join(parts)})?" if "" in terms else parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"


def _whole(text: str, first: int, last: int) -> bool:
    """Return whether text[first:last] has the borders of a word."""
    if first and _joined(text[first - 1], text[first]):
        return False
    if last == len(text):
        return True
    mark = _kind(text[last]) == "M"  # it belongs to the last character
    return not mark and not _joined(text[last - 1], text[last])


def _joined(a: str, b: str) -> bool:
    """Return whether two neighbours may be parts of one word."""
    within = _kind(a) in "LMN" and _kind(b) in "LMN"
    return within and not (UNSPACED.match(a) or UNSPACED.match(b))


def _kind(character: str) -> str:
    return unicodedata.category(character)[0]
