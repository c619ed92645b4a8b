"""Spam and profanity rules; fastgpt's heuristics, without a paper behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fastgpt.data.clean.features import LOWER, UPPER, Features
from fastgpt.data.clean.gopher import over
from fastgpt.data.clean.step import State, Step
from fastgpt.data.clean.terms import WordList


@dataclass
class Spam(Step):
    """Drop texts of advertising phrases, of links, or in capitals.

    Attributes:
        words: a word list, or "built-in".
        max_phrase_ratio: largest number of phrases per word, counted from `min_phrases` on.
        min_phrases: phrases below which a text is not spam.
        max_link_ratio: largest number of links per word, counted from `min_links` on.
        min_links: links below which a text is not spam.
        max_capital_ratio: largest share of capitals among the cased letters.
    """

    name: ClassVar[str] = "spam"
    rules: ClassVar[tuple[str, ...]] = ("spam_phrases", "spam_links", "spam_capitals")
    words: str = "built-in"
    max_phrase_ratio: float | None = 0.02
    min_phrases: int = 4
    max_link_ratio: float | None = 0.1
    min_links: int = 5
    max_capital_ratio: float | None = 0.5

    def __post_init__(self) -> None:
        self._list = WordList.of(self.words, "spam")

    def decide(self, features: Features, state: State) -> str | None:
        words = max(features.n_words, 1)
        links = features.text.count("http://") + features.text.count("https://")
        if links >= self.min_links and over(links / words, self.max_link_ratio):
            return "spam_links"
        upper = np.count_nonzero(features.classes & UPPER)
        cased = upper + np.count_nonzero(features.classes & LOWER)
        if over(upper / max(cased, 1), self.max_capital_ratio):
            return "spam_capitals"
        if self.max_phrase_ratio is not None:
            phrases = self._list.total(features)
            if phrases >= self.min_phrases and phrases / words > self.max_phrase_ratio:
                return "spam_phrases"
        return None


@dataclass
class Profanity(Step):
    """Count the words of a list; drop texts in which they are too frequent.

    Attributes:
        words: a word list, or "built-in".
        max_ratio: largest number of these words per word of the text; None only counts.
    """

    name: ClassVar[str] = "profanity"
    rules: ClassVar[tuple[str, ...]] = ("profanity",)
    words: str = "built-in"
    max_ratio: float | None = 0.01

    def __post_init__(self) -> None:
        self._list = WordList.of(self.words, "profanity")

    def decide(self, features: Features, state: State) -> str | None:
        number = self._list.total(features)
        state.count("profanity.words", number)
        return "profanity" if over(number / max(features.n_words, 1), self.max_ratio) else None
