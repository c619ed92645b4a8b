"""Words of texts as 64-bit hashes, and hashes of n words in a row, in numpy over many texts at once.

A word is a run of letters, digits, marks and underscores of the text in NFC and lower case; everything else separates
words. Characters of scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) are a word each.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SEPARATOR, IN_WORD, ALONE = 0, 1, 2
# Scripts without spaces between words: Thai to Tibetan, Burmese, Khmer, kana, ideographs, their extensions.
UNSPACED = (
    *((0xE00, 0xEFF), (0x1000, 0x109F), (0x1780, 0x17FF)),
    *((0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)),
)
ASSIGNED = ((0, 0x34000), (0xE0000, 0xE0200))  # where letters, digits and marks are
CHUNK = 1 << 18  # bytes of text hashed at once: the arrays stay in the cache
LONG = 256  # bytes; a longer word is hashed by BLAKE2b

_ODD = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_BASE = 0xD1342543DE82EF95  # odd, so it has an inverse modulo 2^64
_FIRST_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)  # (9,) keeps the first n of 8 bytes


@dataclass(slots=True)
class Words:
    """Hashes of the words of several texts, end to end.

    Attributes:
        hashes: (W,) uint64, one a word
        bounds: (texts + 1,) int64; words bounds[i] to bounds[i + 1] belong to text i
    """

    hashes: np.ndarray
    bounds: np.ndarray


def lowered(text: str) -> str:
    """Return the text in NFC and lower case."""
    return (text if text.isascii() else unicodedata.normalize("NFC", text)).lower()


def split(text: str) -> list[str]:
    """Return the words of a text as strings, in lower case."""
    text = lowered(text)
    return [text[start:end] for start, end in spans(text)]


def spans(text: str) -> list[tuple[int, int]]:
    """Return the first and the past-the-end character of each word of a text, which is not normalised first."""
    encoded = text.encode("utf-8", "surrogatepass")
    starts, ends = _edges(_padded(encoded))
    if len(encoded) == len(text):
        return list(zip(starts.tolist(), ends.tolist()))
    is_first = (np.frombuffer(encoded, np.uint8) & 0xC0) != 0x80
    character = np.concatenate([[0], np.cumsum(is_first)])  # characters before each byte
    return list(zip(character[starts].tolist(), character[ends].tolist()))


def chunks(texts: Sequence[str], size: int = CHUNK) -> Iterator[slice]:
    """Yield slices of texts that hold at least `size` characters each, the last one excepted."""
    first, held = 0, 0
    for i, text in enumerate(texts):
        held += len(text)
        if held >= size:
            yield slice(first, i + 1)
            first, held = i + 1, 0
    if first < len(texts):
        yield slice(first, len(texts))


def hash_words(texts: Sequence[str]) -> Words:
    """Return the hashes of all words of the texts. Equal words have equal hashes in every process."""
    encoded = [lowered(text).encode("utf-8", "surrogatepass") for text in texts]
    sizes = np.fromiter(map(len, encoded), np.int64, len(encoded))
    buffer = _padded(b"\n".join(encoded))
    starts, ends = _edges(buffer)
    firsts = np.concatenate([[0], np.cumsum(sizes + 1)])
    return Words(_hash(buffer, starts, ends), np.searchsorted(starts, firsts))


def mix(x: np.ndarray) -> np.ndarray:
    """Return hashes (uint64) whose every bit depends on every bit of x: the finalizer of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))


def grams(words: Words, n: int, whole: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the hashes of every n words in a row.

    Args:
        n: words of a gram
        whole: count a text of fewer than n words, but not of none, as one gram

    Returns:
        hashes: (G,) uint64, text after text
        first: (G,) int64, the index of the gram's first word in `words.hashes`
        bounds: (texts + 1,) int64; grams bounds[i] to bounds[i + 1] belong to text i
    """
    w = len(words.hashes)
    counts = np.diff(words.bounds)
    ends = np.repeat(words.bounds[1:], counts)  # (W,) past the last word of the text that holds the word
    at = np.arange(w)
    valid = at + n <= ends
    if whole:
        valid[words.bounds[:-1][counts > 0]] = True
    first = np.flatnonzero(valid)
    last = np.minimum(first + n, ends[first])
    powers, inverses = _powers(w)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(words.hashes * powers[:w])])
    hashes = (sums[last] - sums[first]) * inverses[first] + (last - first).astype(np.uint64) * _ODD
    return mix(hashes), first, np.searchsorted(first, words.bounds)


def _padded(encoded: bytes) -> np.ndarray:
    """Return the bytes and eight zero bytes, so eight bytes can be read from every position."""
    return np.frombuffer(encoded + bytes(8), np.uint8)


def _edges(buffer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and the past-the-end byte of each word of UTF-8 text that ends with zero bytes."""
    inside = np.empty(len(buffer) + 1, bool)  # one byte before the text
    inside[0] = False
    np.take(_byte_classes(), buffer, out=inside[1:], mode="clip")
    alone, after = _classify(buffer, inside[1:])
    edge = inside[1:] != inside[:-1]
    if not len(alone):
        edges = np.flatnonzero(edge)
        return edges[0::2], edges[1::2]
    start, end = edge & inside[1:], edge & inside[:-1]
    for cut in (alone, after):
        start[cut] |= inside[1:][cut]
        end[cut] |= inside[:-1][cut]
    return np.flatnonzero(start), np.flatnonzero(end)


def _classify(buffer: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Set `inside` at the bytes of characters beyond ASCII that belong to words.

    Returns:
        The first bytes of characters that are a word each, and the bytes after these characters.
    """
    lead = np.flatnonzero(buffer >= 0xC0)
    if not len(lead):
        return lead, lead
    head = buffer[lead]
    size = 2 + (head >= 0xE0).astype(np.int64) + (head >= 0xF0)
    code = (head & (0x7F >> size)).astype(np.int64)
    for i in range(1, 4):
        code = np.where(i < size, code << 6 | (buffer[lead + i] & 0x3F), code)
    kind = _code_classes()[code]
    for i in range(4):
        more = lead[(i < size) & (kind != SEPARATOR)]
        inside[more + i] = True
    alone = kind == ALONE
    return lead[alone], (lead + size)[alone]


def _hash(buffer: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return a hash for each word: eight bytes are mixed in at a time, so most words cost one step."""
    eight = np.ndarray((len(buffer) - 7,), "<u8", buffer, strides=(1,))
    sizes = ends - starts
    hashes = mix((eight[starts] & _FIRST_BYTES[np.minimum(sizes, 8)]) + sizes.astype(np.uint64) * _ODD)
    longer = np.flatnonzero(sizes > 8)
    done = 8
    while len(longer) and done < LONG:
        left = np.minimum(sizes[longer] - done, 8)
        hashes[longer] = mix(hashes[longer] * _ODD + (eight[starts[longer] + done] & _FIRST_BYTES[left]))
        done += 8
        longer = longer[sizes[longer] > done]
    for i in longer.tolist():
        digest = hashlib.blake2b(buffer[starts[i] : ends[i]].tobytes(), digest_size=8).digest()
        hashes[i] = int.from_bytes(digest, "little")
    return hashes


@lru_cache(maxsize=1)
def _byte_classes() -> np.ndarray:
    """Return whether each byte is an ASCII character that belongs to words: (256,) bool."""
    return np.array([chr(i).isalnum() or chr(i) == "_" if i < 128 else False for i in range(256)])


@lru_cache(maxsize=1)
def _code_classes() -> np.ndarray:
    """Return the class of each code point: (0x110000,) uint8."""
    kinds = np.zeros(0x110000, np.uint8)
    for first, last in ASSIGNED:
        kinds[first:last] = [unicodedata.category(chr(i))[0] in "LNM" for i in range(first, last)]
    kinds[ord("_")] = IN_WORD
    for first, last in UNSPACED:
        kinds[first : last + 1] *= ALONE
    return kinds


_tables: list[np.ndarray] = [np.ones(1, np.uint64), np.ones(1, np.uint64)]


def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return at least `count` powers of the base modulo 2^64, and of its inverse: uint64."""
    if len(_tables[0]) < count:
        size = 1 << (count - 1).bit_length()
        for i, base in enumerate((_BASE, pow(_BASE, -1, 1 << 64))):
            steps = np.full(size, base, np.uint64)
            steps[0] = 1
            _tables[i] = np.cumprod(steps)
    return _tables[0], _tables[1]
