"""Overlap of documents with evaluation sets: n words in a row that also occur there (GPT-3 and the Pile use 13).

Words are lower case and without punctuation (`words`). Each hit of a hash is confirmed by the words themselves, so no
collision drops a document. An evaluation text of fewer than n words has no n-gram. From `shortest` words on, all its
words in a row count as an overlap; a shorter one overlaps only with a document that has exactly these words, because
an answer like "yes" is found in every corpus.

Source: Brown et al., Language Models are Few-Shot Learners (arXiv 2005.14165), appendix C.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastgpt.core.errors import UserError
from fastgpt.data.dedup.words import chunks, grams, hash_words, spans, split

SHORTEST = 8  # words; GPT-3 uses 8 to 13
MARGIN = 200  # characters that GPT-3 cuts on each side of an overlap


@dataclass(slots=True)
class Overlap:
    """A stretch of a document that occurs in evaluation files.

    Attributes:
        start, end: the first and the past-the-end character
        words: its length in words
        files: names of the evaluation files, sorted
    """

    start: int
    end: int
    words: int
    files: tuple[str, ...]


@dataclass(slots=True)
class Hit:
    """An n-gram, or a whole short text, of an evaluation file in a document.

    Attributes:
        gram: a hash of its words
        first, words: its first word in the document, and how many it has
        start, end: the first and the past-the-end character
        file: name of the evaluation file
    """

    gram: int
    first: int
    words: int
    start: int
    end: int
    file: str


@dataclass(slots=True)
class EvaluationFile:
    """How the texts of an evaluation file are looked for.

    Attributes:
        texts: texts with at least one word
        short: texts among them with fewer than n words, which are looked for as a whole
        tiny: texts among the short ones that overlap only with a document of exactly the same words
    """

    texts: int = 0
    short: int = 0
    tiny: int = 0


@dataclass(slots=True)
class Contamination:
    """What `NgramIndex.clean` did.

    Attributes:
        documents: documents that overlap with each evaluation file
        places: stretches that overlap with each evaluation file
        dropped: documents that are gone
        cut: documents that lost a part of their text
    """

    documents: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    cut: int = 0

    def add(self, other: Contamination) -> None:
        """Add the counts of other documents."""
        self.documents.update(other.documents)
        self.places.update(other.places)
        self.dropped += other.dropped
        self.cut += other.cut


class NgramIndex:
    """The n-grams of evaluation texts.

    Args:
        texts: evaluation texts by the name of their file
        n: words of an n-gram
        shortest: words from which a shorter text is looked for inside documents

    Attributes:
        files: how the texts of each file are looked for
    """

    def __init__(self, texts: Mapping[str, Iterable[str]], n: int = 13, shortest: int = SHORTEST) -> None:
        if not 1 <= shortest <= n:
            raise ValueError(f"NgramIndex: shortest must be in [1, n], got {shortest} with n = {n}")
        self.n, self.shortest = n, shortest
        self.files = {name: EvaluationFile() for name in texts}
        self._names = list(texts)
        self._texts: list[tuple[int, str]] = []  # file, text
        grams_of: dict[int, list[np.ndarray]] = defaultdict(list)
        for number, (name, members) in enumerate(texts.items()):
            for text in members:
                self._add(number, self.files[name], text, grams_of)
        self._tables = {length: _Table(np.concatenate(found, axis=1)) for length, found in grams_of.items()}
        self._words = lru_cache(maxsize=64)(lambda i: split(self._texts[i][1]))

    @classmethod
    def from_files(
        cls,
        files: Sequence[str | Path],
        n: int = 13,
        fields: Sequence[str] = (),
        shortest: int = SHORTEST,
    ) -> NgramIndex:
        """Index evaluation files.

        Args:
            files: .jsonl and .json files, of whose records each string is a text; any other file is one text
            n: words of an n-gram
            fields: the fields of the records to take; empty for all
            shortest: words from which a shorter text is looked for inside documents

        Raises:
            UserError: a file that cannot be read, is not UTF-8 or not JSON, or has none of the fields
        """
        return cls({str(path): list(_texts_of(Path(path), fields)) for path in files}, n, shortest)

    def overlaps(self, text: str) -> list[Overlap]:
        """Return the stretches of a document that overlap with evaluation texts, in order."""
        return self.overlaps_of([text])[0]

    def overlaps_of(self, texts: Sequence[str]) -> list[list[Overlap]]:
        """Return the overlaps of each document; much faster than one call for each."""
        return [_joined(hits) for hits in self.hits_of(texts)]

    def hits_of(self, texts: Sequence[str]) -> list[list[Hit]]:
        """Return the n-grams of evaluation texts in each document, in the order of their first words."""
        result: list[list[Hit]] = []
        for part in chunks(texts):
            found: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
            words = hash_words(texts[part])
            for length, table in self._tables.items():
                hashes, first, bounds = grams(words, length, whole=length == self.n)
                for gram, entry in table.lookup(hashes):
                    text = int(np.searchsorted(bounds, gram, "right")) - 1
                    found[text].append((int(first[gram] - words.bounds[text]), length, entry))
            result += [self._confirmed(text, found[i]) if i in found else [] for i, text in enumerate(texts[part])]
        return result

    def clean(
        self, texts: Sequence[str], action: Literal["drop", "cut"] = "drop", margin: int = MARGIN
    ) -> tuple[list[str | None], Contamination]:
        """Remove what overlaps with evaluation texts.

        Args:
            texts: the documents
            action: "drop" documents with an overlap, or "cut" the overlaps out
            margin: characters to cut on each side as well; a document shorter than this after the cut is dropped

        Returns:
            The texts, None for a dropped one, and the counts.
        """
        report = Contamination()
        result: list[str | None] = []
        for text, overlaps in zip(texts, self.overlaps_of(texts)):
            kept: str | None = text
            if overlaps:
                stay = pieces(text, [(o.start, o.end) for o in overlaps], margin) if action == "cut" else []
                left = "\n".join(text[start:end] for start, end in stay)
                kept = left if left.strip() and len(left) >= margin else None
                report.documents.update({name for overlap in overlaps for name in overlap.files})
                report.places.update(name for overlap in overlaps for name in overlap.files)
                report.dropped += kept is None
                report.cut += kept is not None
            result.append(kept)
        return result, report

    def _add(self, number: int, file: EvaluationFile, text: str, grams_of: dict[int, list[np.ndarray]]) -> None:
        words = hash_words([text])
        count = len(words.hashes)
        if not count:
            return
        file.texts += 1
        file.short += count < self.n
        file.tiny += count < self.shortest
        # Tiny texts are found as the whole of documents that are as short, which `grams` hashes for length n.
        length = count if self.shortest <= count < self.n else self.n
        hashes, first, _ = grams(words, length)
        row = np.full(len(hashes), len(self._texts))
        grams_of[length].append(np.stack([hashes.view(np.int64), np.full(len(hashes), number), row, first]))
        self._texts.append((number, text))

    def _confirmed(self, text: str, found: list[tuple[int, int, int]]) -> list[Hit]:
        """Return those of the hits (first word, length, entry of the table) whose words agree."""
        words, places = split(text), spans(text)
        if len(places) != len(words):  # normalization moved the borders of words: the whole document overlaps
            places = [(0, len(text))] * len(words)
        hits: list[Hit] = []
        for first, length, entry in sorted(found):
            table = self._tables[length]
            record, at = table.entries[entry].tolist()
            gram = words[first : first + length]
            if gram == self._words(record)[at : at + length]:
                name, last = self._names[self._texts[record][0]], first + len(gram) - 1
                hits.append(Hit(int(table.hashes[entry]), first, len(gram), places[first][0], places[last][1], name))
        return hits


class _Table:
    """Grams of one length, each once for a file, sorted by hash.

    Args:
        rows: (4, G) int64: hash, file, text, first word
    """

    def __init__(self, rows: np.ndarray) -> None:
        _, unique = np.unique(rows[:2], axis=1, return_index=True)
        hashes = rows[0, unique].view(np.uint64)
        order = np.argsort(hashes, kind="stable")
        self.hashes, self.entries = hashes[order], rows[2:, unique[order]].T  # (G,), (G, 2)
        bits = min(max((16 * len(self.hashes)).bit_length(), 12), 26)
        self.mask = np.uint64((1 << bits) - 1)
        self.maybe = np.zeros(1 << bits, bool)  # by the low bits of a hash; most documents end here
        self.maybe[self.hashes & self.mask] = True

    def lookup(self, hashes: np.ndarray) -> Iterator[tuple[int, int]]:
        """Yield (index in hashes, entry) for each hash that is in the table."""
        at = np.flatnonzero(self.maybe[hashes & self.mask])
        start = np.searchsorted(self.hashes, hashes[at], "left")
        end = np.searchsorted(self.hashes, hashes[at], "right")
        for i in np.flatnonzero(end > start).tolist():
            yield from ((int(at[i]), entry) for entry in range(int(start[i]), int(end[i])))


def _joined(hits: Sequence[Hit]) -> list[Overlap]:
    """Return the stretches that hits cover; hits that touch are one."""
    joined: list[tuple[int, int, int, int, set[str]]] = []  # words from, to; characters from, to; files
    for hit in hits:
        stop = hit.first + hit.words
        if joined and hit.first <= joined[-1][1]:
            first, last, start, end, names = joined.pop()
            joined.append((first, max(last, stop), start, hit.end if stop > last else end, names | {hit.file}))
        else:
            joined.append((hit.first, stop, hit.start, hit.end, {hit.file}))
    return [Overlap(start, end, last - first, tuple(sorted(names))) for first, last, start, end, names in joined]


def pieces(text: str, places: Sequence[tuple[int, int]], margin: int) -> list[tuple[int, int]]:
    """Return the parts of a text, (first, past-the-end) character, outside the places and `margin` characters on each
    side of them; parts without a visible character are left out. places: ascending, may overlap."""
    found, position = [], 0
    for start, end in (*places, (len(text) + margin, 0)):
        found.append((position, max(start - margin, position)))
        position = max(position, end + margin)
    return [(start, end) for start, end in found if text[start:end].strip()]


def _texts_of(path: Path, fields: Sequence[str]) -> Iterator[str]:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the evaluation file {path}: {error}") from None
    if path.suffix not in (".jsonl", ".json"):
        yield content
        return
    records = _records(path, content)
    if fields and not any(isinstance(record, dict) and set(fields) & set(record) for record in records):
        raise UserError(f"no record of the evaluation file {path} has a field {' or '.join(map(repr, fields))}")
    for record in records:
        chosen = [record.get(name) for name in fields] if fields and isinstance(record, dict) else record
        yield from _strings(chosen)


def _records(path: Path, content: str) -> list[Any]:
    if path.suffix == ".json":
        lines = [(1, content)]
    else:
        lines = [(i, line) for i, line in enumerate(content.split("\n"), 1) if line.strip()]
    records: list[Any] = []
    for number, line in lines:
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            place = number + error.lineno - 1
            raise UserError(f"{path}:{place} is not JSON: {error.msg} at column {error.colno}") from None
        records += value if path.suffix == ".json" and isinstance(value, list) else [value]
    return records


def _strings(value: Any) -> Iterator[str]:
    """Yield the strings anywhere in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for member in value.values() if isinstance(value, dict) else value:
            yield from _strings(member)
