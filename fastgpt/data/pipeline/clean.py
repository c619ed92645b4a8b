"""Clean one part of a source: read, validate, clean, split by document, fingerprint; with a report of what was lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fastgpt.data.clean import Cleaner, Tally
from fastgpt.data.dedup import DedupSettings, fingerprint
from fastgpt.data.pipeline.gather import Unit
from fastgpt.data.pipeline.store import ALL, Chunk, ChunkWriter, hash64, key_of, new_result, read_json, write_json
from fastgpt.data.read import Defect, Format, open_documents
from fastgpt.data.recipe import SourceRecipe

EXAMPLES = 5  # ids of dropped documents, and defects, that a report names for each rule
PRINTS = "prints"  # stem of a chunk's fingerprints


@dataclass(frozen=True)
class CleanTask:
    """A part to clean, with everything that its result depends on.

    Attributes:
        cleaner: fingerprint of the cleaning rules.
        validation: share of the documents to hold out.
        dedup: None if duplicates stay.
        chunk_bytes: text of a chunk, about.
        folder: where results of parts are; this one is below it, under `key`.
    """

    unit: Unit
    source: SourceRecipe
    format: Format
    cleaner: str
    validation: float
    seed: int
    dedup: DedupSettings | None
    chunk_bytes: int
    folder: Path

    @cached_property
    def key(self) -> str:
        dedup = self.dedup
        prints = None if dedup is None else [dedup.near, dedup.shingle, dedup.bands, dedup.rows, dedup.seed]
        facts = self.unit.source, self.unit.facts, asdict(self.format), self.cleaner, self.source.sample
        return key_of("clean", *facts, self.validation, self.seed, prints, self.chunk_bytes)


@dataclass
class Counts:
    """What happened to the documents of one part.

    Attributes:
        documents, bytes: read from the files.
        unsampled: documents that `sample` left out.
        defects: kind -> how many; defect_examples: some of them, in words.
        tally: what the cleaning rules did.
    """

    documents: int = 0
    bytes: int = 0
    unsampled: int = 0
    defects: dict[str, int] = field(default_factory=dict)
    defect_examples: list[str] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)

    def defect(self, defect: Defect) -> None:
        """Count a defect."""
        self.defects[defect.kind] = self.defects.get(defect.kind, 0) + 1
        if len(self.defect_examples) < EXAMPLES:
            self.defect_examples.append(str(defect))

    def add(self, other: dict[str, Any]) -> None:
        """Add the counts of another part, as `asdict` returns them."""
        for name in ("documents", "bytes", "unsampled"):
            setattr(self, name, getattr(self, name) + other[name])
        self.defects = dict(Counter(self.defects) + Counter(other["defects"]))
        self.defect_examples += other["defect_examples"][: EXAMPLES - len(self.defect_examples)]
        self.tally.merge(Tally.from_json(other["tally"]))


def clean(task: CleanTask) -> str:
    """Clean a part into its folder, unless that exists, and return its key."""
    key = task.key
    if (task.folder / key).exists():
        return key
    counts = Counts()
    with new_result(task.folder / key) as aside:
        writers = [ChunkWriter(aside / name, task.chunk_bytes, lambda p, t: _fingerprint(p, t, task)) for name in "tv"]
        with writers[0], writers[1]:
            _process(task, writers, counts)
        chunks = [done | {"held": bool(i)} for i, writer in enumerate(writers) for done in writer.done]
        write_json(aside / "report.json", {"counts": asdict(counts), "chunks": chunks})
    return key


def _process(task: CleanTask, writers: list[ChunkWriter], counts: Counts) -> None:
    cleaner = Cleaner.of(task.source.clean)
    source, seed = task.unit.source, str(task.seed)
    for part in task.unit.parts:
        for document in open_documents(part, task.format, counts.defect):
            counts.documents += 1
            counts.bytes += len(document.text.encode())
            if task.source.sample < 1 and hash64(seed, "sample", source, document.id) >= task.source.sample * ALL:
                counts.unsampled += 1
                continue
            document.source = source
            outcome = cleaner.process(document)
            counts.tally.add(document, outcome)
            if outcome.document is not None:
                digest = hash64(seed, source, document.id)
                writers[digest < task.validation * ALL].add(outcome.document.text, document.id, digest)


def _fingerprint(place: Path, texts: list[str], task: CleanTask) -> None:
    if task.dedup is not None:
        fingerprint(texts, task.dedup).save(place / PRINTS)


def chunks_of(folder: Path, source: str, key: str) -> list[Chunk]:
    """Return the chunks of a cleaned part."""
    return [
        Chunk(source, folder / key / c["name"], f"{key}/{c['name']}", c["held"], c["documents"], c["bytes"])
        for c in read_json(folder / key / "report.json")["chunks"]
    ]


def counts_of(folder: Path, key: str) -> dict[str, Any]:
    """Return the counts of a cleaned part as plain values."""
    counts: dict[str, Any] = read_json(folder / key / "report.json")["counts"]
    return counts
