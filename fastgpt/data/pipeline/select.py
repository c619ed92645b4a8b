"""Select: which documents of every chunk are kept, after deduplication, decontamination, erasures and limits.

A held-out document stays where a training document is its duplicate, so that no copy of it is trained on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.core.errors import UserError
from fastgpt.data.dedup import DedupPart, DedupSettings, Duplicates, NgramIndex, find
from fastgpt.data.pipeline.clean import EXAMPLES, PRINTS
from fastgpt.data.pipeline.manifest import ERASED
from fastgpt.data.pipeline.store import Chunk, key_of, new_result, read_json, write_json
from fastgpt.data.recipe import Recipe
from fastgpt.data.shards import file_hash

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class LeakTask:
    """Find the documents of a chunk that overlap evaluation files; `contents` is their digest."""

    chunk: Chunk
    files: tuple[str, ...]
    contents: str
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / key_of("leaks", self.chunk.key, self.contents)


def contents_of(files: Sequence[str]) -> str:
    """Return a digest of evaluation files. Raises UserError if one is missing."""
    for path in files:
        if not Path(path).is_file():
            raise UserError(f"decontaminate names {path}, expected a file")
    return key_of([file_hash(Path(path)) for path in files])


def find_leaks(task: LeakTask) -> None:
    """Write which documents of a chunk overlap the evaluation files: leaks.npy, (n,) bool."""
    if task.path.exists():
        return
    index = _index(task.files, task.contents)
    leaks = [bool(found) for texts in task.chunk.texts() for found in index.overlaps_of(texts)]
    with new_result(task.path) as aside:
        np.save(aside / "leaks.npy", np.array(leaks, bool))


@functools.lru_cache(1)
def _index(files: tuple[str, ...], contents: str) -> NgramIndex:
    return NgramIndex.from_files(list(files))


@dataclass(frozen=True)
class Selection:
    """What is kept: a mask file for each chunk, (n,) bool, and the report of what was dropped."""

    masks: list[Path]
    report: dict[str, Any]


@dataclass(frozen=True)
class Erased:
    """Documents that `fastgpt data forget` erased: (source, id), and the sha256 of their texts."""

    ids: frozenset[tuple[str, str]]
    hashes: frozenset[str]


class Selector:
    """Decides about all chunks of a build.

    Args:
        leaks: for each chunk its folder from `find_leaks`; empty without evaluation files.
    """

    def __init__(
        self,
        recipe: Recipe,
        dedup: DedupSettings | None,
        chunks: Sequence[Chunk],
        leaks: Sequence[Path],
        erased: Erased,
    ) -> None:
        self.recipe, self.dedup, self.chunks, self.leaks, self.erased = recipe, dedup, chunks, leaks, erased
        self.dropped: dict[str, Counter[str]] = {name: Counter() for name in recipe.sources}
        self.examples: dict[str, dict[str, list[str]]] = {name: {} for name in recipe.sources}

    def key(self) -> str:
        dedup = None if self.dedup is None else asdict(self.dedup)
        limits = {name: source.max_documents for name, source in self.recipe.sources.items()}
        erased = [sorted(self.erased.ids), sorted(self.erased.hashes)]
        names = [chunk.key for chunk in self.chunks], [path.name for path in self.leaks]
        return key_of("select", list(limits.items()), dedup, erased, *names)

    def run(self, folder: Path) -> Selection:
        """Return the selection, from the folder of an earlier call if there is one."""
        place = folder / self.key()
        if not place.exists():
            with new_result(place) as aside:
                found = self._duplicates(aside)
                left = self._limits()
                for i, chunk in enumerate(self.chunks):
                    np.save(aside / f"{i:06}.npy", self._mask(i, chunk, found, left))
                write_json(aside / "report.json", self._report(found))
        return Selection([place / f"{i:06}.npy" for i in range(len(self.chunks))], read_json(place / "report.json"))

    def _duplicates(self, scratch: Path) -> Duplicates | None:
        if self.dedup is None or not self.chunks:
            return None
        order = {name: i for i, name in enumerate(self.recipe.sources)}
        self.parts = [
            DedupPart(f"{order[c.source]:05}/{i:09}", c.source, "val" if c.held else "train", c.folder / PRINTS)
            for i, c in enumerate(self.chunks)
        ]

        def texts_of(part: DedupPart, rows: npt.NDArray[Any]) -> list[str]:
            return [text for texts in self._chunk(part.name).texts(rows) for text in texts]

        return find(self.parts, texts_of, self.dedup, scratch)

    def _chunk(self, part: str) -> Chunk:
        return self.chunks[int(part.partition("/")[2])]

    def _limits(self) -> dict[tuple[str, bool], int]:
        """Return how many documents of each source and split may stay, by (source, held out), where there is a limit.

        The split comes first, so a limit is divided as the documents are: it never leaves nothing to validate on.
        """
        limits = {}
        for name, source in self.recipe.sources.items():
            if source.max_documents is not None:
                share = self.recipe.validation if source.validation is None else source.validation
                held = math.ceil(source.max_documents * share)
                limits[name, True], limits[name, False] = held, source.max_documents - held
        return limits

    def _mask(self, i: int, chunk: Chunk, found: Duplicates | None, left: dict[tuple[str, bool], int]) -> Mask:
        keep: Mask = np.ones(chunk.documents, bool)
        if self.leaks:
            self._drop(chunk, keep, ~np.load(self.leaks[i] / "leaks.npy"), "contaminated")
        if found is not None:
            self._drop(chunk, keep, found.keep(self.parts[i]), "duplicate")
        if self.erased.ids or self.erased.hashes:
            self._drop(chunk, keep, ~self._erased(chunk), "erased")
        limit = left.get((chunk.source, chunk.held))
        if limit is not None:
            self._drop(chunk, keep, np.cumsum(keep) <= limit, "beyond max_documents")
            left[chunk.source, chunk.held] = limit - int(keep.sum())
        return keep

    def _drop(self, chunk: Chunk, keep: Mask, right: Mask, rule: str) -> None:
        """Clear `keep` where `right` is false, and count it under the rule."""
        rows = np.flatnonzero(keep & ~right)
        keep &= right
        if len(rows):
            self.dropped[chunk.source][rule] += len(rows)
            named = self.examples[chunk.source].setdefault(rule, [])
            if len(named) < EXAMPLES:
                ids = chunk.ids()
                named += [ids[row] for row in rows[: EXAMPLES - len(named)]]

    def _erased(self, chunk: Chunk) -> Mask:
        by_id = np.array([(chunk.source, identity) in self.erased.ids for identity in chunk.ids()], bool)
        texts = (text for batch in chunk.texts() for text in batch) if self.erased.hashes else ()
        by_text = [hashlib.sha256(text.encode()).hexdigest() in self.erased.hashes for text in texts]
        return by_id | np.array(by_text, bool) if by_text else by_id

    def _report(self, found: Duplicates | None) -> dict[str, Any]:
        report: dict[str, Any] = {"dropped": {n: dict(c) for n, c in self.dropped.items()}, "examples": self.examples}
        if found is not None:
            pairs = [[self._named(*pair.first), self._named(*pair.second), pair.similarity] for pair in found.pairs]
            report["duplicates"] = {
                "counts": [[*sources, asdict(counts)] for sources, counts in sorted(found.counts.items())],
                "empty": dict(found.empty),
                "pairs": pairs,
                "work": asdict(found.work),
            }
        return report

    def _named(self, part: str, row: int) -> list[str]:
        """Return source and id of a document."""
        chunk = self._chunk(part)
        return [chunk.source, chunk.ids()[row]]


def read_erased(out: Path) -> Erased:
    """Return what OUT/erased.jsonl lists. Raises UserError if it is damaged."""
    path = out / ERASED
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        entries = [json.loads(line) for line in lines]
        ids = frozenset((e["source"], e["id"]) for e in entries)
        return Erased(ids, frozenset(e["sha256"] for e in entries))
    except (OSError, ValueError, KeyError, TypeError) as e:
        what = f"{type(e).__name__}: {e}"
        raise UserError(f"{path} is damaged ({what}), expected lines of `fastgpt data forget`") from None
