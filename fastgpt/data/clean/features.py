"""Words of a text as numpy arrays, computed once and shared by all rules.

A text of n characters becomes an array of code points, a byte of class flags for each of them, the bounds of its
tokens, and a 64-bit hash for each token. Rules about repetition then sort integers instead of counting tuples of
strings, so their cost is a few nanoseconds a character.

Tokens follow spaCy's English rules, which the thresholds of the published filters were set with: a token is a run of
letters and digits with the marks inside it ("3.14", "covid-19", "o'clock", "x@y.org"), or one mark of punctuation.
Words that a hyphen or a comma joins are separate tokens, and so are "do" and "n't", "it" and "'s". The exceptions of
spaCy (abbreviations, emoticons) are not followed.

The hash of a token of code points c_0..c_k-1 is sum((c_i + 1) * B**i) mod 2**64 for an odd constant B, mixed by the
finalizer of splitmix64 (Steele et al. 2014). Two tokens of a text share a hash with probability about 2**-64.
"""

from __future__ import annotations

import unicodedata
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

WORD, ALPHA, SPACE, DIGIT, UPPER, LOWER, FILLED = 1, 2, 4, 8, 16, 32, 128
U64 = NDArray[np.uint64]

_BASE = 0x9E3779B97F4A7C15 | 1
_BLOCK = 1 << 18  # characters hashed at a time, which bounds the memory of long texts
_CONTRACTIONS = ("s", "d", "m", "ll", "re", "ve")


def _flags(char: str) -> int:
    """Return the class flags of a character."""
    mark = unicodedata.category(char)[0] == "M"
    word = char.isalnum() or char == "_" or mark or char == "\u200d"
    kinds = ((word, WORD), (char.isalpha(), ALPHA), (char.isspace(), SPACE), (char.isdigit(), DIGIT))
    cases = ((char.isupper(), UPPER), (char.islower(), LOWER))
    return FILLED | sum(flag for holds, flag in (*kinds, *cases) if holds)


_CLASSES = np.zeros(0x110000, dtype=np.uint8)  # flags of each code point; filled at its first use
_CLASSES[:128] = [_flags(chr(code)) for code in range(128)]
_LOWERED = np.array([ord(chr(code).lower()) for code in range(128)], dtype=np.uint8)


def _powers() -> tuple[U64, U64]:
    """Return the powers of the base and of its inverse modulo 2**64, each (_BLOCK,)."""
    inverse = pow(_BASE, -1, 1 << 64)
    tables = []
    for base in (_BASE, inverse):
        table = np.full(_BLOCK, base, dtype=np.uint64)
        table[0] = 1
        tables.append(np.cumprod(table, dtype=np.uint64))
    return tables[0], tables[1]


_POWERS, _INVERSES = _powers()
_VALUES = np.where(_CLASSES[:128] & SPACE, 0, np.arange(128) + 1).astype(np.uint64)  # what an ASCII character adds
_LOWER_VALUES = np.where(_CLASSES[:128] & SPACE, 0, _LOWERED.astype(np.int64) + 1).astype(np.uint64)


def mix(hashes: U64) -> U64:
    """Return hashes (n,) with their bits mixed by the finalizer of splitmix64."""
    h = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


class Features:
    """Properties of one text that rules ask for, each computed at its first use.

    Attributes:
        text: the text.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def codes(self) -> NDArray[np.uint8] | NDArray[np.uint32]:
        """Code points (n,): uint8 for ASCII, else uint32."""
        if self.text.isascii():
            return np.frombuffer(self.text.encode("ascii"), dtype=np.uint8)
        return np.frombuffer(self.text.encode("utf-32-le", "surrogatepass"), dtype="<u4")

    @cached_property
    def classes(self) -> NDArray[np.uint8]:
        """Class flags of the characters (n,): WORD, ALPHA, SPACE, DIGIT, UPPER, LOWER."""
        classes = _CLASSES[self.codes]
        if self.codes.dtype != np.uint8 and classes.size and not classes.min():
            for code in np.unique(self.codes[classes == 0]).tolist():
                _CLASSES[code] = _flags(chr(code))
            classes = _CLASSES[self.codes]
        return classes

    def _joins(self, at: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Return which marks, at positions (m,) between two word characters, belong to the word around them."""
        codes, left, right = self.codes[at], self.classes[at - 1], self.classes[at + 1]
        letters = (left & right & ALPHA) != 0
        digits = (left & right & DIGIT) != 0
        hyphen = (codes == ord("-")) | (codes == ord("~")) | (codes == 0x2013) | (codes == 0x2014)
        splits = hyphen & (letters | digits)
        splits |= (codes == ord(",")) & letters
        splits |= (codes == ord(".")) & ((left & LOWER) != 0) & ((right & UPPER) != 0)
        splits |= np.isin(codes, _BEFORE_LETTERS) & ((right & ALPHA) != 0)
        return ~(splits | (codes == 0x2026))

    def _contractions(self) -> list[int]:
        """Return the positions where "'s", "'ll" or "n't" start inside words."""
        starts = []
        for mark in ("'", "’"):
            at = self.text.find(mark, 1)
            while at > 0:
                end = at + 1
                while end < at + 4 and end < len(self.text) and self.text[end].isalnum():
                    end += 1
                tail = self.text[at + 1 : end].lower()
                if tail == "t" and self.text[at - 1] in "nN" and self.text[at - 2 : at - 1].isalpha():
                    starts.append(at - 1)
                elif tail in _CONTRACTIONS and self.text[at - 1].isalnum():
                    starts.append(at)
                at = self.text.find(mark, at + 1)
        return starts

    @cached_property
    def bounds(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Starts and ends of the tokens, (w,) each, in characters."""
        classes = self.classes
        if not classes.size:
            return np.zeros(0, np.intp), np.zeros(0, np.intp)
        word = (classes & WORD) != 0
        space = (classes & SPACE) != 0
        marks = np.flatnonzero(~(word | space))
        inner = marks[(marks > 0) & (marks < len(classes) - 1)]
        inner = inner[word[inner - 1] & word[inner + 1]]
        word[inner[self._joins(inner)]] = True
        start = ~space
        start[1:] &= ~(word[1:] & word[:-1])
        if ".." in self.text:  # a run of dots is one token
            dots = self.codes == ord(".")
            start[1:] &= ~(dots[1:] & dots[:-1] & ~word[1:] & ~word[:-1])
        if contractions := self._contractions():
            start[contractions] = True
        last = ~space  # ends lie before a space or the next start
        last[:-1] &= space[1:] | start[1:]
        return np.flatnonzero(start), np.flatnonzero(last) + 1

    @cached_property
    def n_words(self) -> int:
        """Number of tokens."""
        return len(self.bounds[0])

    @cached_property
    def lengths(self) -> NDArray[np.intp]:
        """Characters in each token (w,)."""
        return self.bounds[1] - self.bounds[0]

    @cached_property
    def flags(self) -> NDArray[np.uint8]:
        """Class flags that any character of a token has (w,)."""
        starts = self.bounds[0]
        return np.bitwise_or.reduceat(self.classes, starts) if len(starts) else np.zeros(0, np.uint8)

    def _hash(self, lower: bool) -> U64:
        """Return the hash of each token (w,), of its lower case if asked."""
        (starts, ends), ascii_ = self.bounds, self.codes.dtype == np.uint8
        hashes = np.zeros(len(starts), dtype=np.uint64)
        table, first = _LOWER_VALUES if lower else _VALUES, 0
        while first < len(starts):
            begin = int(starts[first])
            after = max(int(np.searchsorted(ends, begin + _BLOCK, side="right")), first + 1)
            stop = int(ends[after - 1])
            codes = self.codes[begin:stop]
            if ascii_:
                values = table[codes]
            else:
                values = codes.astype(np.uint64) + np.uint64(1)
                values[(self.classes[begin:stop] & SPACE) != 0] = 0
            at, size = starts[first:after] - begin, len(values)
            values *= _POWERS[:size] if size <= _BLOCK else np.resize(_POWERS, size)
            hashes[first:after] = np.add.reduceat(values, at) * _INVERSES[at]
            first = after
        return mix(hashes)

    @cached_property
    def hashes(self) -> U64:
        """Hash of each token (w,)."""
        return self._hash(lower=False)

    @cached_property
    def lowered(self) -> U64:
        """Hash of each token of the text in lower case (w,); word lists and the classifier look these up."""
        return self._hash(lower=True) if self.text.isascii() else Features(self.text.lower()).hashes

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank."""
        return [line for line in self.text.split("\n") if line and not line.isspace()]

    def n_grams(self, n: int) -> U64:
        """Return the hash of each run of n tokens, (max(w - n + 1, 0),)."""
        return n_grams(self.hashes, n)


_BEFORE_LETTERS = np.array([ord(c) for c in ":<>=/"])


def n_grams(hashes: U64, n: int) -> U64:
    """Return the hash of each run of n tokens, from the hashes of the tokens (w,)."""
    if len(hashes) < n:
        return np.zeros(0, dtype=np.uint64)
    grams = hashes
    for k in range(1, n):
        grams = grams[:-1] * np.uint64(_BASE) + hashes[k:]
    return grams
