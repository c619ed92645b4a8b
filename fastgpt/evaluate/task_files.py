"""The benchmarks that a preset can run, and their files: found in the user's folder, read and checked row by row."""

from __future__ import annotations

import csv
import fnmatch
import functools
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastgpt.core.errors import UserError, cause_of
from fastgpt.evaluate.json_lines import read_objects
from fastgpt.evaluate.schemas import SCHEMAS, Row

TEMPLATES = Path(__file__).with_name("tasks")
GENERIC = re.compile(r"(train|dev|val|valid|validation|test)([._-]|$)|\*\.")  # such files must lie in a task's folder


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the harness, from tasks/<name>.yaml.

    Attributes:
        include: the harness's own YAML, below lm_eval/tasks; {part} stands for a subject or a paradigm.
        shots: examples in each prompt.
        metrics: names of the harness.
        folders: names that the folder of the files may have.
        splits: split -> patterns of its files; the first pattern that fits is taken. The first split is evaluated, the
            second has the examples.
        labels: file -> file of its answers, one a line.
        parts: how many subjects or paradigms there are; 0: it is one task.
    """

    name: str
    include: str
    shots: int
    metrics: list[str]
    folders: list[str]
    splits: dict[str, list[str]]
    labels: dict[str, str] = field(default_factory=dict)
    parts: int = 0

    @property
    def split(self) -> str:
        """The split that is evaluated."""
        return next(iter(self.splits))

    def needs(self, shots: int) -> list[str]:
        """Return the splits that must be there."""
        return list(self.splits)[: 2 if shots else 1]


@functools.cache
def benchmarks() -> dict[str, Benchmark]:
    """Return the benchmarks by name."""
    paths = sorted(TEMPLATES.glob("*.yaml"))
    return {p.stem: Benchmark(p.stem, **yaml.safe_load(p.read_text(encoding="utf-8"))) for p in paths}


def find(data: Path, benchmark: Benchmark, split: str) -> list[Path]:
    """Return the files of a split: in a folder of the benchmark, at any depth, or in `data` if their names tell."""
    folders = [p for name in benchmark.folders for p in [data / name] if p.is_dir()]
    for pattern in benchmark.splits[split]:
        for folder in folders:
            if found := sorted(p for p in folder.rglob("*") if p.is_file() and _fits(p.relative_to(folder), pattern)):
                return found
        if not GENERIC.match(pattern) and "/" not in pattern and (found := sorted(data.glob(pattern))):
            return found
    return []


def _fits(path: Path, pattern: str) -> bool:
    """Return whether the end of a path fits; the hub has parquet files as test-00000-of-00001 and as test/0000."""
    patterns = {pattern, pattern.replace("-*.parquet", "/*.parquet")}
    return any(fnmatch.fnmatch(path.as_posix(), p) or fnmatch.fnmatch(path.as_posix(), f"*/{p}") for p in patterns)


def where_to_put(benchmark: Benchmark, data: Path | None, shots: int) -> str:
    """Say which files are wanted, official or from the hub, and where."""
    patterns = [benchmark.splits[split] for split in benchmark.needs(shots)]
    official = " and ".join(each[0] for each in patterns)
    hub = " and ".join(next(p for p in each if p.endswith(".parquet")) for each in patterns)
    return f"{official}, or {hub}, in {data or 'DIR'}/{benchmark.folders[0]}"


def read(benchmark: Benchmark, files: list[Path]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each part ("" if the benchmark has none) in the columns of the harness.

    Raises:
        UserError: a file cannot be read or has no rows, or a row is wrong; names the file and the line.
    """
    if not benchmark.parts and len({path.parent for path in files}) > 1:
        raise UserError(f"{benchmark.name} has {files[0]} and {files[-1]}, expected the files of one folder")
    parts: dict[str, list[dict[str, Any]]] = {}
    convert = SCHEMAS[benchmark.name]
    for path in files:
        rows = [convert(row) for row in _rows(path, benchmark)]
        if not rows:
            raise UserError(f"{path} has no rows, expected those of {benchmark.name}")
        for row in rows:
            parts.setdefault(row.pop("part", ""), []).append(row)
    return parts


def _rows(path: Path, benchmark: Benchmark) -> Iterator[Row]:
    """Yield the rows of a .jsonl, .csv or .parquet file."""
    part = path.parent.name if path.suffix == ".parquet" else re.sub("_(test|dev)$", "", path.stem)
    try:
        rows, labels = list(_READERS[path.suffix](path)), _labels(path, benchmark)
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} cannot be read ({cause_of(e)}), expected UTF-8") from None
    if labels is None:
        yield from (Row(values, f"{path}:{line}", part) for line, values in rows)
        return
    if len(labels) != len(rows):
        raise UserError(f"the labels of {path} are {len(labels)}, expected {len(rows)}, one for each of its rows")
    yield from (Row(values, f"{path}:{line}", part, label) for (line, values), label in zip(rows, labels, strict=True))


def _labels(path: Path, benchmark: Benchmark) -> list[str] | None:
    """Return the answers that lie beside a file, one a line; None if there are none."""
    if path.name not in benchmark.labels:
        return None
    beside = path.with_name(benchmark.labels[path.name])
    return beside.read_text(encoding="utf-8").split() if beside.is_file() else None


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of MMLU's files, which have no header: question, four choices, letter of the answer."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        for cells in reader:
            if len(cells) != 6:
                raise UserError(
                    f"{path}:{reader.line_num} has {len(cells)} columns, expected 6: question, 4 choices, answer"
                )
            yield reader.line_num, {"question": cells[0], "choices": cells[1:5], "answer": cells[5]}


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(f"{path} needs pyarrow, expected `pip install fastgpt[eval]`") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except ValueError as e:
        raise UserError(f"{path} is not a parquet file ({cause_of(e)})") from None
    yield from enumerate(rows, 1)


_READERS = {".jsonl": read_objects, ".csv": _csv, ".parquet": _parquet}
