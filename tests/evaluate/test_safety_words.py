"""Word lists: many terms are found as one after the other would be, and where a word is known to end."""

from __future__ import annotations

import random

from fastgpt.evaluate.safety.words import Words, last_border


def test_terms_are_found_as_by_trying_each() -> None:
    rng = random.Random(1)
    for _ in range(300):
        terms = ["".join(rng.choice("ab ") for _ in range(rng.randint(1, 4))).strip() or "a" for _ in range(5)]
        text = "".join(rng.choice("ab .") for _ in range(20))
        found = Words(terms)
        expected, end = 0, 0
        normal = " ".join(text.split())
        for at in range(len(normal)):
            fits = [
                t
                for t in found.terms
                if normal.startswith(t, at)
                and not (at and normal[at - 1].isalpha() and t[0].isalpha())
                and not normal[at + len(t) : at + len(t) + 1].isalpha()
            ]
            if at >= end and fits:
                expected, end = expected + 1, at + max(map(len, fits))
        assert found.count(text) == expected, (terms, text)


def test_borders() -> None:
    assert [last_border(t) for t in ("", "a", "ab", "a b", "a.", "敏感", "e\u0301", "a ™")] == [0, 0, 0, 2, 1, 1, 0, 2]
