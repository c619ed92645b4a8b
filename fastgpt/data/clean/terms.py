"""Word lists: how often terms of each category occur in a text.

A list is a file of lines "category: term, term" or lines with one term each; "#" starts a comment. A term is one to
four words; case does not matter. A few small lists are built in, and each can be replaced by a file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastgpt.core.errors import UserError
from fastgpt.data.clean.features import BASE, U64, Features, n_grams

MAX_WORDS = 4

PROFANITY = {
    "profanity": (
        "arse asshole bastard bitch bollocks bullshit crap damn dickhead fuck fucked fucking motherfucker piss "
        "shit shitty "
        "wanker"
    ).split()
}
TOXIC = {
    "insult": "idiot idiots imbecile loser losers moron morons pathetic scum stupid worthless".split(),
    "threat": ["i will kill you", "kill yourself", "kill them all", "hope you die"],
    "profanity": PROFANITY["profanity"],
}
GROUPS = {
    "gender.female": "she her hers herself woman women female girl girls mother mothers daughter wife".split(),
    "gender.male": "he him his himself man men male boy boys father fathers son husband".split(),
    "religion.christian": "christian christians christianity catholic catholics protestant protestants".split(),
    "religion.muslim": "muslim muslims islam islamic".split(),
    "religion.jewish": "jew jews jewish judaism".split(),
    "religion.hindu": "hindu hindus hinduism".split(),
    "religion.buddhist": "buddhist buddhists buddhism".split(),
    "religion.none": "atheist atheists atheism agnostic".split(),
    "origin.african": "african africans african-american".split(),
    "origin.asian": "asian asians chinese japanese korean indian".split(),
    "origin.european": "european europeans british french german italian".split(),
    "origin.latin_american": "latino latina latinos latinas hispanic hispanics mexican".split(),
    "origin.arab": "arab arabs arabic".split(),
    "age.young": ["young", "youth", "teenager", "teenagers"],
    "age.old": ["elderly", "old people", "senior citizen", "senior citizens", "pensioner", "pensioners"],
    "disability": ["disabled", "disability", "disabilities", "blind", "deaf", "wheelchair"],
    "orientation": ["gay", "lesbian", "bisexual", "transgender", "heterosexual", "homosexual"],
}
SPAM = {
    "spam": (
        "viagra, cialis, casino, jackpot, payday, buy now, order now, click here, act now, limited time offer, "
        "free shipping, "
        "best price, lowest price, cheap price, special offer, money back guarantee, risk free, earn money, "
        "make money online, "
        "work from home, weight loss, online pharmacy, no prescription, replica watches, free download, promo code, "
        "discount code, visit our website, subscribe now, double your, satisfaction guaranteed, credit score"
    ).split(", ")
}
BUILT_IN = {"profanity": PROFANITY, "toxic": TOXIC, "groups": GROUPS, "spam": SPAM}


def read_terms(path: str) -> dict[str, list[str]]:
    """Return the terms of a file by category; lines without a category belong to "terms"."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"word list {path}: {getattr(e, 'strerror', None) or 'not UTF-8'}, expected a text file"
        ) from None
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        line = line.partition("#")[0].strip()
        category, colon, terms = line.partition(":")
        if not colon:
            category, terms = "terms", line
        found.setdefault(category.strip(), []).extend(t.strip() for t in terms.split(",") if t.strip())
    if not any(found.values()):
        raise UserError(f"word list {path}: no terms, expected lines such as 'term' or 'category: term, term'")
    return {category: terms for category, terms in found.items() if terms}


class WordList:
    """Terms by category, found in a text by their hashes.

    Attributes:
        categories: names of the categories, sorted.
    """

    def __init__(self, terms: dict[str, list[str]]) -> None:
        self.categories = sorted(terms)
        tables: dict[int, dict[int, set[int]]] = {}  # by number of words, then hash: the numbers of the categories
        first: set[int] = set()
        for number, category in enumerate(self.categories):
            for term in terms[category]:
                hashes = Features(term.lower()).hashes
                if not 0 < len(hashes) <= MAX_WORDS:
                    raise UserError(f"word list: {term!r} has {len(hashes)} words, expected 1 to {MAX_WORDS}")
                first.add(int(hashes[0]))
                table = tables.setdefault(len(hashes), {})
                table.setdefault(int(n_grams(hashes, len(hashes))[0]), set()).add(number)
        self._first = np.array(sorted(first), dtype=np.uint64)  # hashes of the first words of terms
        self._tables: list[tuple[int, U64, NDArray[np.intp]]] = []
        for n, table in sorted(tables.items()):
            member = np.zeros((len(table), len(self.categories)), dtype=np.intp)
            for row, hash_ in enumerate(sorted(table)):
                member[row, sorted(table[hash_])] = 1
            self._tables.append((n, np.array(sorted(table), dtype=np.uint64), member))

    @classmethod
    def of(cls, words: str, key: str) -> WordList:
        """Return the built-in list `key` for "built-in", else the list of the file `words`."""
        return cls(BUILT_IN[key] if words == "built-in" else read_terms(words))

    def counts(self, features: Features) -> NDArray[np.intp]:
        """Return how often terms of each category occur, (len(categories),)."""
        counts, hashes = np.zeros(len(self.categories), dtype=np.intp), features.lowered
        at = np.flatnonzero(_find(self._first, hashes)[1])
        for n, table, member in self._tables:
            at = at[at + n <= len(hashes)]
            grams = hashes[at]
            for k in range(1, n):
                grams = grams * np.uint64(BASE) + hashes[at + k]
            row, found = _find(table, grams)
            counts += np.bincount(row[found], minlength=len(table)) @ member
        return counts

    def total(self, features: Features) -> int:
        """Return how often any term occurs."""
        return int(self.counts(features).sum())


def _find(table: U64, hashes: U64) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Return the row of each hash (n,) in a sorted table, and whether it is there."""
    row = np.minimum(np.searchsorted(table, hashes), len(table) - 1)
    return row, table[row] == hashes
