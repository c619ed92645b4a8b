"""Select: which documents of every chunk are kept, after deduplication, decontamination, erasures and limits.

A held-out document stays where a training document is its duplicate, so that no copy of it is trained on.
"""

from __future__ import annotations

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
from fastgpt.data.dedup import DedupPart, DedupSettings, Duplicates, find
from fastgpt.data.pipeline.clean import EXAMPLES, PRINTS
from fastgpt.data.pipeline.leaks import PIECE, common_grams, pieces_of, read_hits
from fastgpt.data.pipeline.manifest import ERASED
from fastgpt.data.pipeline.store import Chunk, key_of, new_result, read_json, write_json
from fastgpt.data.recipe import Recipe

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Selection:
    """What is kept: a mask file for each chunk, (n,) bool, and the report of what was dropped.

    pieces: for each chunk the parts of its documents that are cut, (n,) of PIECE; None if documents are never cut.
    """

    masks: list[Path]
    pieces: list[Path | None]
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
        self.evaluation = recipe.evaluation
        self.cut: Counter[str] = Counter()  # documents by source
        self.dropped: dict[str, Counter[str]] = {name: Counter() for name in recipe.sources}
        self.examples: dict[str, dict[str, list[str]]] = {name: {} for name in recipe.sources}

    def key(self) -> str:
        dedup = None if self.dedup is None else asdict(self.dedup)
        limits = {name: source.max_documents for name, source in self.recipe.sources.items()}
        erased = [sorted(self.erased.ids), sorted(self.erased.hashes)]
        names = [chunk.key for chunk in self.chunks], [path.name for path in self.leaks]
        rule = [self.evaluation.action, self.evaluation.common] if self.leaks else []
        return key_of("select", list(limits.items()), dedup, erased, *names, rule)

    def run(self, folder: Path) -> Selection:
        """Return the selection, from the folder of an earlier call if there is one."""
        place = folder / self.key()
        if not place.exists():
            with new_result(place) as aside:
                found = self._duplicates(aside)
                left = self._limits()
                common = self._common(found)
                for i, chunk in enumerate(self.chunks):
                    clean, pieces = self._leaks(i, common)
                    mask = self._mask(i, chunk, clean, found, left)
                    np.save(aside / f"{i:06}.npy", mask)
                    if self._cuts:
                        pieces = pieces[mask[pieces["row"]]]
                        self.cut[chunk.source] += len(np.unique(pieces["row"]))
                        np.save(aside / f"{i:06}.pieces.npy", pieces)
                write_json(aside / "report.json", self._report(found))
        numbers = range(len(self.chunks))
        pieces_at = [place / f"{i:06}.pieces.npy" if self._cuts else None for i in numbers]
        return Selection([place / f"{i:06}.npy" for i in numbers], pieces_at, read_json(place / "report.json"))

    @property
    def _cuts(self) -> bool:
        return bool(self.leaks) and self.evaluation.action == "cut"

    def _common(self, found: Duplicates | None) -> npt.NDArray[np.uint64]:
        """Return the n-grams that too many training documents hold to be a leak; duplicates count once."""
        if not self.leaks or self.evaluation.common is None:
            return np.zeros(0, np.uint64)
        train = [i for i, chunk in enumerate(self.chunks) if not chunk.held]

        def hits(i: int) -> npt.NDArray[Any]:
            all_ = read_hits(self.leaks[i])
            return all_ if found is None else all_[found.keep(self.parts[i])[all_["row"]]]

        return common_grams(map(hits, train), self.evaluation.common)

    def _leaks(self, i: int, common: npt.NDArray[np.uint64]) -> tuple[Mask, npt.NDArray[Any]]:
        """Return which documents of a chunk are not dropped as contaminated, (n,) bool, and the PIECEs of the cut ones.

        common: n-grams that do not count.
        """
        clean: Mask = np.ones(self.chunks[i].documents, bool)
        if not self.leaks:
            return clean, np.zeros(0, PIECE)
        hits = read_hits(self.leaks[i])
        hits = hits[~np.isin(hits["gram"], common)]
        pieces = pieces_of(self.chunks[i], hits) if self._cuts else np.zeros(0, PIECE)
        clean[hits["row"]] = False
        clean[pieces["row"]] = True
        return clean, pieces

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

    def _mask(
        self, i: int, chunk: Chunk, clean: Mask, found: Duplicates | None, left: dict[tuple[str, bool], int]
    ) -> Mask:
        keep: Mask = np.ones(chunk.documents, bool)
        self._drop(chunk, keep, clean, "contaminated")
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
        report["changes"] = {name: {"decontaminate": n} for name, n in self.cut.items() if n}
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
