"""Words of a text as numpy arrays, computed once and shared by all rules.

A text of n characters becomes an array of code points, a byte of class flags for each of them, the bounds of its
tokens, and a 64-bit hash for each token. Rules about repetition then sort integers instead of counting tuples of
strings, so their cost is a few nanoseconds a character.

Tokens follow spaCy's English rules, which datatrove counts words with. Spaces separate chunks. Marks of punctuation at
both ends of a chunk are tokens of one character. Inside, a mark belongs to the word ("3.14", "covid-19", "foo(bar")
unless it stands between letters that it joins ("well-known", "and/or", "a,b", "End.Next"): then it is a token too. A
run of dots and a URL are one token; "don't" is "do" and "n't", "it's" is "it" and "'s". spaCy's lists of exceptions
(abbreviations, emoticons, units) are not followed.

The hash of a token of code points c_0..c_k-1 is sum((c_i + 1) * B**i) mod 2**64 for an odd constant B, mixed by the
finalizer of splitmix64 (Steele et al. 2014). Two tokens of a text share a hash with probability about 2**-64.
"""

from __future__ import annotations

import unicodedata
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

WORD, ALPHA, SPACE, DIGIT, UPPER, LOWER, MARK, FILLED = 1, 2, 4, 8, 16, 32, 64, 128
# Kinds of marks: cut from both ends of a chunk, from its start only, full stops, never cut; and where they split a
# word.
EDGE, PREFIX, DOT, STICK, BETWEEN_LETTERS, BETWEEN_DIGITS, BEFORE_LETTERS = 1, 2, 3, 4, 8, 16, 32
U64 = NDArray[np.uint64]

BASE = 0x9E3779B97F4A7C15 | 1
_BLOCK = 1 << 18  # characters hashed at a time, which bounds the memory of long texts
_OPENING = "([{<\"'`*_#&"
_CONTRACTIONS = ("s", "d", "m", "ll", "re", "ve")


def _flags(char: str) -> int:
    """Return the class flags of a character."""
    category = unicodedata.category(char)
    if category == "So":
        _KINDS[ord(char)] = EDGE
    word = char.isalnum() or char == "\u200d" or category[0] == "M"
    flags = ((word, WORD), (char.isalpha(), ALPHA), (char.isspace(), SPACE), (char.isdigit(), DIGIT))
    more = ((char.isupper() or category == "Lt", UPPER), (char.islower(), LOWER), (_KINDS[ord(char)], MARK))
    return FILLED | sum(flag for holds, flag in (*flags, *more) if holds)


_KINDS = np.zeros(0x110000, dtype=np.uint8)  # kind of each mark
for _kind, _marks in (
    (EDGE, ",:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪…'\"”“`‘´’‚„»«「」『』（）〔〕【】《》〈〉"),
    (PREFIX, "§%=—–+$£€¥₹"),
    (DOT, "."),
    (STICK, "-/~^"),
    (BETWEEN_LETTERS, "-–—~,"),
    (BETWEEN_DIGITS, "-+*^"),
    (BEFORE_LETTERS, ":<>=/"),
):
    _KINDS[[ord(_mark) for _mark in _marks]] |= _kind
_CLASSES = np.zeros(0x110000, dtype=np.uint8)  # flags of each code point; filled at its first use
_CLASSES[:128] = [_flags(chr(code)) for code in range(128)]


def _powers() -> tuple[U64, U64]:
    """Return the powers of the base and of its inverse modulo 2**64, each (_BLOCK,)."""
    inverse = pow(BASE, -1, 1 << 64)
    tables = []
    for base in (BASE, inverse):
        table = np.full(_BLOCK, base, dtype=np.uint64)
        table[0] = 1
        tables.append(np.cumprod(table, dtype=np.uint64))
    return tables[0], tables[1]


_POWERS, _INVERSES = _powers()
_VALUES = np.where(_CLASSES[:128] & SPACE, 0, np.arange(128) + 1).astype(np.uint64)  # what an ASCII character adds


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

    def _infixes(self, at: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Return which marks, at positions (m,), are tokens between the parts of a word that they join."""
        codes, last = self.codes[at], len(self.codes) - 1
        left, right, kinds = self.classes[np.maximum(at - 1, 0)], self.classes[np.minimum(at + 1, last)], _KINDS[codes]
        both = left & right
        splits = ((both & ALPHA) != 0) & ((kinds & BETWEEN_LETTERS) != 0)
        splits |= ((both & DIGIT) != 0) & ((kinds & BETWEEN_DIGITS) != 0)
        splits |= ((left & (ALPHA | DIGIT)) != 0) & ((right & ALPHA) != 0) & ((kinds & BEFORE_LETTERS) != 0)
        splits |= (codes == ord(".")) & ((left & LOWER) != 0) & ((right & UPPER) != 0)
        splits |= (codes == ord("+")) & ((left & DIGIT) != 0) & ((right & SPACE) != 0)
        if urls := self._urls():
            splits &= ~np.isin(self._chunks[at], self._chunks[urls])
        return splits

    def _urls(self) -> list[int]:
        """Return the positions of "://" in chunks that begin with the scheme of a URL, leading marks apart."""
        found, at = [], self.text.find("://")
        while at >= 0:
            before = self.text[max(at - 40, 0) : at].split()
            if before and before[-1].lstrip(_OPENING).isalpha():
                found.append(at)
            at = self.text.find("://", at + 3)
        return found

    def _dots(self, at: NDArray[np.intp], core: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which full stops, at positions (m,), belong to words: inside one, before one, or after one letter."""
        codes, n = self.codes, len(self.codes)
        after = (at + 1 < n) & core[np.minimum(at + 1, n - 1)]
        left, second = np.maximum(at - 1, 0), np.maximum(at - 2, 0)
        initial = ((self.classes[left] & UPPER) != 0) & ((self.classes[second] & UPPER) == 0) | (left == 0)
        initial |= (self.classes[left] & ALPHA != 0) & (codes[second] == ord(".")) & (at > 1)
        run = ((codes[left] == ord(".")) & (at > 0)) | ((codes[np.minimum(at + 1, n - 1)] == ord(".")) & (at + 1 < n))
        return (after | (initial & core[left])) & ~run

    @cached_property
    def _chunks(self) -> NDArray[np.int32]:
        """Number of spaces before each character (n,), equal within a chunk."""
        return np.cumsum((self.classes & SPACE) != 0, dtype=np.int32)

    @cached_property
    def _core(self) -> NDArray[np.bool_]:
        """Which characters (n,) belong to tokens of several characters."""
        classes, chunks = self.classes, self._chunks
        core = (classes & (SPACE | MARK)) == 0
        at = np.flatnonzero(classes & MARK)
        if not len(at):
            return core
        kinds = _KINDS[self.codes[at]] & 7
        core[at[kinds == STICK]] = True
        runs = np.flatnonzero(core[1:] & ~core[:-1]) + 1
        runs = np.concatenate(([0], runs)) if core[0] else runs
        inner = np.zeros(len(at), dtype=np.bool_)
        if len(runs):
            after = np.searchsorted(runs, at)
            before = (after > 0) & (chunks[runs[after - 1]] == chunks[at])
            follows = (after < len(runs)) & (chunks[runs[np.minimum(after, len(runs) - 1)]] == chunks[at])
            inner = before & (follows | (kinds == PREFIX))
        inner &= self.codes[at] != ord("…")
        dots = kinds == DOT
        inner[dots] = self._dots(at[dots], core)
        core[at] = (inner | (kinds == STICK)) & ~self._infixes(at)
        return core

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
        space, core = (classes & SPACE) != 0, self._core
        start = ~space
        start[1:] &= ~(core[1:] & core[:-1])
        if ".." in self.text:  # a run of dots is one token
            dots = (self.codes == ord(".")) & ~core
            start[1:] &= ~(dots[1:] & dots[:-1])
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

    @cached_property
    def _sums(self) -> U64:
        """Sum of (code point + 1) * B**position over each token (w,)."""
        (starts, ends), ascii_ = self.bounds, self.codes.dtype == np.uint8
        sums = np.zeros(len(starts), dtype=np.uint64)
        first = 0
        while first < len(starts):
            begin = int(starts[first])
            after = max(int(np.searchsorted(ends, begin + _BLOCK, side="right")), first + 1)
            stop = int(ends[after - 1])
            if ascii_:
                values = _VALUES[self.codes[begin:stop]]
            else:
                values = self.codes[begin:stop].astype(np.uint64) + np.uint64(1)
                values[(self.classes[begin:stop] & SPACE) != 0] = 0
            at, size = starts[first:after] - begin, len(values)
            values *= _POWERS[:size] if size <= _BLOCK else np.resize(_POWERS, size)
            sums[first:after] = np.add.reduceat(values, at) * _INVERSES[at]
            first = after
        return sums

    @cached_property
    def hashes(self) -> U64:
        """Hash of each token (w,)."""
        return mix(self._sums)

    @cached_property
    def lowered(self) -> U64:
        """Hash of each token of the text in lower case (w,); word lists and the classifier look these up."""
        sums, starts = self._sums.copy(), self.bounds[0]
        capitals = np.flatnonzero(self.classes & UPPER)
        tokens = np.searchsorted(starts, capitals, side="right") - 1
        if self.codes.dtype == np.uint8:
            change = np.full(len(capitals), 32, dtype=np.uint64)  # ord("a") - ord("A")
        else:
            codes, each = np.unique(self.codes[capitals], return_inverse=True)
            lower = [(code, chr(code).lower()) for code in codes.tolist()]
            change = np.array([(ord(c) - code) % 2**64 if len(c) == 1 else 0 for code, c in lower], np.uint64)[each]
        np.add.at(sums, tokens, change * _POWERS[(capitals - starts[tokens]) % _BLOCK])
        return mix(sums)

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank."""
        return [line for line in self.text.split("\n") if line and not line.isspace()]

    def n_grams(self, n: int) -> U64:
        """Return the hash of each run of n tokens, (max(w - n + 1, 0),)."""
        return n_grams(self.hashes, n)


def n_grams(hashes: U64, n: int) -> U64:
    """Return the hash of each run of n tokens, from the hashes of the tokens (w,)."""
    if len(hashes) < n:
        return np.zeros(0, dtype=np.uint64)
    grams = hashes
    for k in range(1, n):
        grams = grams[:-1] * np.uint64(BASE) + hashes[k:]
    return grams
