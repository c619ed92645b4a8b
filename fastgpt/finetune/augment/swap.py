"""Counterfactual swaps: rows in which each term stands for its counterpart, as she for he, and he for she.

A file of terms has a pair a line. `he, she` swaps both ways, `his > her` one way; # begins a comment. A term that has
two counterparts is an error, so that none is guessed. Whole words are swapped, all at once, in the case of what they
replace.

Source: Zhao et al., Gender Bias in Coreference Resolution (arXiv 1804.06876).
"""

from __future__ import annotations

import re
from pathlib import Path

from fastgpt.core.errors import UserError, cause_of


class Terms:
    """Terms and their counterparts.

    Args:
        path: a file of terms.

    Raises:
        UserError: with file and line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._found: dict[str, tuple[str, str]] = {}  # in lower case -> as the file writes them
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"swap: {path} cannot be read ({cause_of(e)}), expected a file of terms") from None
        for number, line in enumerate(lines, 1):
            if line := line.partition("#")[0].strip():
                self._add(line, f"{path}, line {number}")
        if not self._found:
            raise UserError(f"swap: {path} has no terms, expected lines as in he, she")
        longest = sorted(self._found, key=len, reverse=True)
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest))})(?!\w)", re.IGNORECASE)

    def _add(self, line: str, where: str) -> None:
        one_way = ">" in line
        parts = [" ".join(part.split()) for part in line.split(">" if one_way else ",")]
        if len(parts) != 2 or not all(parts) or parts[0].lower() == parts[1].lower():
            raise UserError(f"swap: {where} is {line!r}, expected two terms, as in he, she or his > her")
        for term, other in [parts] if one_way else [parts, parts[::-1]]:
            before = self._found.setdefault(term.lower(), (term, other))
            if before[1].lower() != other.lower():
                raise UserError(
                    f"swap: {where} gives {term!r} the counterpart {other!r}, but it has {before[1]!r}; "
                    "expected one, and > for what is swapped one way"
                )

    def swap(self, text: str) -> str:
        """Return a text with all terms swapped."""
        return self._pattern.sub(lambda found: self._other(found[0]), text)

    def _other(self, found: str) -> str:
        term, other = self._found.get(found.lower(), (found, found))
        if found == term:
            return other
        if found.isupper() and len(found) > 1:
            return other.upper()
        if found[0].isupper():
            return other[0].upper() + other[1:]
        return other.lower()
