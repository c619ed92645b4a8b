"""Gopher's rules of quality and repetition, with the names and thresholds that datatrove gives them.

Source: Rae et al. 2021, arXiv 2112.11446, section A.1.1 and Table A1. A threshold of None turns its rule off. A ratio
equal to its threshold passes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fastgpt.data.clean.features import ALPHA, WORD, Features
from fastgpt.data.clean.step import State, Step

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_PARAGRAPHS = re.compile(r"\n{2,}")


def repeated(items: list[str]) -> tuple[int, int]:
    """Return how many items occurred before in the list, and their characters."""
    if len(set(items)) == len(items):
        return 0, 0
    seen: set[str] = set()
    number = characters = 0
    for item in items:
        if item in seen:
            number, characters = number + 1, characters + len(item)
        seen.add(item)
    return number, characters


def top_characters(grams: NDArray[np.uint64], lengths: NDArray[np.intp], n: int) -> int:
    """Return the characters of the most frequent n-gram, all its occurrences and inner spaces counted.

    Args:
        grams: hashes of the n-grams (w - n + 1,).
        lengths: characters of the tokens (w,).
        n: tokens of an n-gram.
    """
    ordered = np.sort(grams)
    edges = np.flatnonzero(ordered[1:] != ordered[:-1])
    counts = np.diff(edges, prepend=-1, append=len(ordered) - 1)
    most = int(counts.max())
    if most == 1:
        first = 0
    else:  # the first in the text of those that are most frequent
        tied = ordered[np.append(edges, len(ordered) - 1)[counts == most]]
        first = int(np.flatnonzero(grams == tied[0] if len(tied) == 1 else np.isin(grams, tied))[0])
    return most * (int(lengths[first : first + n].sum()) + n - 1)


def not_unique(grams: NDArray[np.uint64]) -> NDArray[np.intp]:
    """Return the positions of the values (m,) that occur more than once."""
    ordered = np.sort(grams)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(twice):
        return np.zeros(0, dtype=np.intp)
    at = np.minimum(np.searchsorted(twice, grams), len(twice) - 1)
    return np.flatnonzero(twice[at] == grams)


def repeated_characters(grams: NDArray[np.uint64], at: NDArray[np.intp], total: NDArray[np.intp], n: int) -> int:
    """Return the characters of n-grams that occurred before, without overlaps, from left to right.

    Args:
        grams: hashes of the n-grams (m,) that occur more than once.
        at: positions of their first tokens (m,), rising.
        total: characters in the tokens before each token (w + 1,).
        n: tokens of an n-gram.
    """
    seen: set[int] = set()
    free = characters = 0
    bounds = (total[at + n] - total[at]).tolist()
    for gram, position, size in zip(grams.tolist(), at.tolist(), bounds):
        if position < free:
            continue
        if gram in seen:
            characters, free = characters + size, position + n
        else:
            seen.add(gram)
    return characters


def over(value: float, limit: float | None) -> bool:
    """Return whether a value exceeds a limit; None is no limit."""
    return limit is not None and value > limit


@dataclass
class GopherRepetition(Step):
    """Drop texts in which lines, paragraphs or n-grams repeat."""

    name: ClassVar[str] = "gopher_repetition"
    dup_line_frac: float | None = 0.3
    dup_para_frac: float | None = 0.3
    dup_line_char_frac: float | None = 0.2
    dup_para_char_frac: float | None = 0.2
    top_n_grams: dict[int, float] = field(default_factory=lambda: {2: 0.2, 3: 0.18, 4: 0.16})
    dup_n_grams: dict[int, float] = field(
        default_factory=lambda: {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    )

    def decide(self, features: Features, state: State) -> str | None:
        text = features.text
        if not text:
            return "empty"
        paragraphs = _PARAGRAPHS.split(text.strip()) if "\n\n" in text else [text]
        number, characters = repeated(paragraphs)
        if over(number / len(paragraphs), self.dup_para_frac):
            return "dup_para_frac"
        if over(characters / len(text), self.dup_para_char_frac):
            return "dup_para_char_frac"
        lines = [line for line in text.split("\n") if line]
        number, characters = repeated(lines)
        if lines and over(number / len(lines), self.dup_line_frac):
            return "dup_line_frac"
        if over(characters / len(text), self.dup_line_char_frac):
            return "dup_line_char_frac"
        return self._top(features) or self._duplicated(features)

    def _top(self, features: Features) -> str | None:
        for n, limit in sorted(self.top_n_grams.items()):
            if features.n_words < n:
                break
            if top_characters(features.n_grams(n), features.lengths, n) / len(features.text) > limit:
                return f"top_{n}_gram"
        return None

    def _duplicated(self, features: Features) -> str | None:
        """An n-gram repeats only where its first n - 1 tokens repeat, so each n searches what the one before left."""
        at: NDArray[np.intp] | None = None
        total = np.concatenate(([0], np.cumsum(features.lengths)))
        for n, limit in sorted(self.dup_n_grams.items()):
            grams = features.n_grams(n)
            if at is None:
                at = not_unique(grams)
            else:
                at = at[at < len(grams)]
                at = at[not_unique(grams[at])]
            if not len(at):
                return None
            characters = repeated_characters(grams[at], at, total, n)
            if characters / len(features.text) > limit:
                return f"duplicated_{n}_n_grams"
        return None


@dataclass
class GopherQuality(Step):
    """Drop texts whose words and lines are not those of prose."""

    name: ClassVar[str] = "gopher_quality"
    min_doc_words: int | None = 50
    max_doc_words: int | None = 100_000
    min_avg_word_length: float | None = 3
    max_avg_word_length: float | None = 10
    max_symbol_word_ratio: float | None = 0.1
    max_bullet_lines_ratio: float | None = 0.9
    max_ellipsis_lines_ratio: float | None = 0.3
    min_alpha_words_ratio: float | None = 0.8
    min_stop_words: int | None = 2
    stop_words: list[str] = field(default_factory=lambda: list(STOP_WORDS))

    def __post_init__(self) -> None:
        self._stop = np.concatenate([Features(word).hashes[:1] for word in self.stop_words or [""]])

    def decide(self, features: Features, state: State) -> str | None:
        words = (features.flags & WORD) != 0
        number = int(np.count_nonzero(words))
        if self.min_doc_words is not None and number < self.min_doc_words:
            return "gopher_short_doc"
        if over(number, self.max_doc_words):
            return "gopher_long_doc"
        mean = float(features.lengths[words].sum()) / max(number, 1)
        if self.min_avg_word_length is not None and mean < self.min_avg_word_length:
            return "gopher_below_avg_threshold"
        if over(mean, self.max_avg_word_length):
            return "gopher_above_avg_threshold"
        if rule := self._symbols(features.text, max(features.n_words, 1)):
            return rule
        alpha = np.count_nonzero(features.flags & ALPHA) / max(features.n_words, 1)
        if self.min_alpha_words_ratio is not None and alpha < self.min_alpha_words_ratio:
            return "gopher_below_alpha_threshold"
        found = np.count_nonzero((features.hashes[:, None] == self._stop).any(axis=0))
        return "gopher_enough_stop_words" if found < (self.min_stop_words or 0) else None

    def _symbols(self, text: str, words: int) -> str | None:
        """Return the rule on hashes, ellipses and bullets that drops the text."""
        ellipses = text.count("...") + text.count("…")
        if over(text.count("#") / words, self.max_symbol_word_ratio):
            return "gopher_too_many_hashes"
        if over(ellipses / words, self.max_symbol_word_ratio):
            return "gopher_too_many_ellipsis"
        lines = text.splitlines() or [""]
        bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines) if "-" in text or "•" in text else 0
        if over(bullets / len(lines), self.max_bullet_lines_ratio):
            return "gopher_too_many_bullets"
        ends = sum(line.rstrip().endswith(("...", "…")) for line in lines) if ellipses else 0
        if over(ends / len(lines), self.max_ellipsis_lines_ratio):
            return "gopher_too_many_end_ellipsis"
        return None
