"""Gather: the files of every source, and the parts that workers read independently of one another."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fastgpt.core.errors import UserError, counted
from fastgpt.core.options import WRONG, convert, did_you_mean
from fastgpt.data.pipeline.engine import Engine
from fastgpt.data.pipeline.fetch import debian_packages, downloaded, python_documentation, scraped
from fastgpt.data.pipeline.store import hash64
from fastgpt.data.read import Defect, DefectError, Format, Part, SourceFile, find_files, parts_of
from fastgpt.data.read.files import glob_pattern
from fastgpt.data.read.hub import DATA, download_dataset
from fastgpt.data.recipe import PLACES, Recipe, SourceRecipe
from fastgpt.data.recipe_reader import KeyedError

log = logging.getLogger("fastgpt")

BATCH = 256 << 20  # bytes that a worker hashes in one task
_SKIP = ", or set defects: skip to do without it"
RUN = 64  # small files of a part, on average


@dataclass(frozen=True)
class Unit:
    """What one worker cleans: parts of large files, or several small files.

    Attributes:
        facts: plain values that name its content: (name, start, stop, digest) of each part.
    """

    source: str
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def facts(self) -> list[tuple[str, int, int, str]]:
        return [(part.name, part.start, part.stop, part.digest) for part in self.parts]


@dataclass
class Found:
    """The files of a source, the license that comes with them ("" if none), and pages that could not be fetched."""

    files: list[SourceFile]
    license: str = ""
    defects: list[Defect] = field(default_factory=list)


@dataclass(frozen=True)
class Gathered:
    """The units of all sources, in the order of the recipe and of the files' names; by source, the license and what
    could not be fetched."""

    units: list[Unit]
    licenses: dict[str, str]
    defects: dict[str, list[Defect]]


def format_for(name: str, source: SourceRecipe) -> Format:
    """Return a source's format. Raises UserError that names the key."""
    where = f"sources.{name}.format"
    given = {"name": source.format} if isinstance(source.format, str) else dict(source.format)
    if source.scrape:
        given = {"name": "jsonl", "id": "id"}
    known = {f.name for f in fields(Format)} - {"mode", "license", "source"}
    for key in given:
        if key not in known:
            expected = ", ".join(sorted(known))
            near = did_you_mean(key, known)
            raise KeyedError(f"{where}.{key}", f"{where}.{key} is not a key, expected {expected}{near}")
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    for key in {"piece_bytes", "max_bytes"} & settings.keys():
        settings[key] = convert(settings[key], int)
        if settings[key] is WRONG:
            raise KeyedError(f"{where}.{key}", f"{where}.{key} is {given[key]!r}, expected a whole number")
    try:
        return Format(**settings, mode=source.defects)  # type: ignore[arg-type]
    except UserError as e:
        raise KeyedError(where, f"{where}: {e}") from None


def gather(recipe: Recipe, work: Path, workers: Engine) -> Gathered:
    """Find the files of all sources, after fetching what is not here yet.

    Raises:
        UserError: a source has no files, or a file or page cannot be read.
    """
    tasks: list[tuple[tuple[SourceFile, ...], Format, int]] = []
    owners: list[str] = []
    licenses = {name: source.license for name, source in recipe.sources.items()}
    defects = {}
    for name, source in recipe.sources.items():
        format = format_for(name, source)
        found = _files(name, source, format, work, workers.show)
        defects[name] = found.defects
        if licenses[name] == "unknown" and found.license:
            licenses[name] = found.license
        for batch in _batches(found.files):
            tasks.append((batch, format, recipe.part_megabytes << 20))
            owners.append(name)
    sizes = [sum(file.size for file in batch) for batch, _, _ in tasks]
    all_parts: dict[str, list[Part]] = {name: [] for name in recipe.sources}
    for name, parts in zip(owners, workers.run("scan", _scan, tasks, sizes), strict=True):
        all_parts[name] += parts
    units = [unit for name, parts in all_parts.items() for unit in _units(name, parts, recipe.part_megabytes << 20)]
    return Gathered(units, licenses, defects)


def _scan(task: tuple[tuple[SourceFile, ...], Format, int]) -> list[Part]:
    files, format, size = task
    return [part for file in files for part in parts_of(file, format, size)]


def _files(name: str, source: SourceRecipe, format: Format, work: Path, show: bool) -> Found:
    """Return a source's files, each with a name that no other one has; no files if it is optional and missing."""
    try:
        found = _found(name, source, format, work, show)
    except UserError as e:
        if not source.optional or isinstance(e, DefectError):
            place = next((k for k in PLACES if getattr(source, k)), "path")
            raise KeyedError(f"sources.{name}.{place}", f"sources.{name}: {e}") from None
        log.warning("source %s is left out: %s", name, e)
        return Found([])
    unwanted = re.compile("|".join(f"(?:{glob_pattern(p).pattern})" for p in source.exclude) or r"(?!)", re.DOTALL)
    unique = {file.path: file for file in found.files if not unwanted.fullmatch(file.name)}.values()
    times = Counter(file.name for file in unique)
    named = [file if times[file.name] == 1 else replace(file, name=file.path.as_posix()) for file in unique]
    if not named:
        raise KeyedError(f"sources.{name}.exclude", f"sources.{name}: exclude leaves out all {len(found.files)} files")
    return replace(found, files=sorted(named, key=lambda file: file.name))


def _found(name: str, source: SourceRecipe, format: Format, work: Path, show: bool) -> Found:
    """Return the files of a source, after fetching what is not here yet."""
    fetched = work / "fetched"
    if source.hub:
        data = download_dataset(source.hub, files=source.path or DATA)
        return Found(data.files, data.license)
    if source.scrape:
        path, defects = scraped(source.scrape, source.license, fetched / name, source.defects == "fail", show)
        if defects and (source.defects == "fail" or not path.stat().st_size):
            first, more = defects[0], counted(len(defects) - 1, "more address", "more addresses")
            others = f" ({more} gave no page)" * (len(defects) > 1)
            raise DefectError(replace(first, problem=first.problem + others, remedy=f"{first.remedy}{_SKIP}"))
        return Found(find_files(path, format).files, defects=defects)
    if source.debian:
        folder = debian_packages(source.debian, fetched)
        paths = [str(folder / path) for path in source.path or [""]]
    elif source.url:
        paths = [str(downloaded(url, fetched / name)) for url in source.url]
    else:
        paths = [str(python_documentation(fetched))] if source.pydoc else source.path
    return Found([file for path in paths for file in find_files(path, format).files])


def _batches(files: Sequence[SourceFile]) -> Iterator[tuple[SourceFile, ...]]:
    batch: list[SourceFile] = []
    for file in files:
        batch.append(file)
        if sum(f.size for f in batch) >= BATCH or len(batch) == 1000:
            yield tuple(batch)
            batch = []
    if batch:
        yield tuple(batch)


def _units(source: str, parts: Sequence[Part], size: int) -> Iterator[Unit]:
    """Group parts of small files. Where a group ends depends on the hashes of names, so that a new file changes the
    groups near it and no others."""
    group: list[Part] = []
    for part in parts:
        if group and sum(p.size for p in group) + part.size > size:
            yield Unit(source, tuple(group))
            group = []
        group.append(part)
        if part.size >= size or hash64(part.name) % RUN == 0:
            yield Unit(source, tuple(group))
            group = []
    if group:
        yield Unit(source, tuple(group))
