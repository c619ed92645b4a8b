"""Presets: lists of the parts of an evaluation, by name or from a file.

- base: what tells small models apart; benchmarks without files are left out, with a note.
- full: every benchmark, all parts of each; missing files are an error.
- safety: bias, toxicity, memorisation and refusal.
- FILE: a YAML list of benchmarks, "perplexity" and suites, or one suite.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fastgpt.core.errors import UserError, cause_of
from fastgpt.evaluate.harness import HarnessTasks
from fastgpt.evaluate.part import Note, Part
from fastgpt.evaluate.perplexity import Perplexity
from fastgpt.evaluate.task_files import Benchmark, benchmarks, find, where_to_put

PRESETS = ("base", "full", "safety")
ORDER = (
    "lambada_openai",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "piqa",
    "blimp",
    "openbookqa",
    "boolq",
    "mmlu",
)
ONLY_FULL = ("arc_challenge",)


def parts_of(preset: str, data: Path | None, texts: Sequence[Path] = ()) -> list[Part]:
    """Return the parts of a preset.

    Args:
        preset: "base", "full", "safety", or a file.
        data: folder with the files of the benchmarks.
        texts: files whose perplexity is computed besides.

    Raises:
        UserError: there is no such preset, folder or file, a benchmark is unknown, or `full` lacks files.
    """
    if data is not None and not data.is_dir():
        what = "probes" if preset == "safety" else "benchmarks"
        raise UserError(f"--data: {data} is not a folder, expected one with the files of the {what}")
    more: list[Part] = [Perplexity(texts, validation=False)] if texts else []
    if preset == "safety":
        from fastgpt.evaluate import safety

        return [*safety.parts_of(data), *more]
    if preset == "full":
        return [Perplexity(texts, required=True), *(_required(name, data) for name in ORDER)]
    if preset == "base":
        return _base(data, texts)
    return [*_of_file(Path(preset), data), *more]


def _base(data: Path | None, texts: Sequence[Path]) -> list[Part]:
    parts: list[Part] = [Perplexity(texts)]
    absent = []
    for name in ORDER:
        benchmark = benchmarks()[name]
        if name in ONLY_FULL:
            continue
        if data is not None and all(find(data, benchmark, split) for split in benchmark.needs(benchmark.shots)):
            parts.append(HarnessTasks(benchmark, data))
        else:
            absent.append(f"{name} ({where_to_put(benchmark, data, benchmark.shots)})")
    if not absent:
        return parts
    return [*parts, Note("absent", "left out for lack of files (--data DIR): " + "; ".join(absent))]


def _required(name: str, data: Path | None) -> HarnessTasks:
    """Return a benchmark with all its parts. Raises UserError if files are missing."""
    benchmark = benchmarks()[name]
    if data is None:
        raise UserError(f"preset full needs the files of {', '.join(ORDER)}, expected --data DIR")
    for split in benchmark.needs(benchmark.shots):
        if not find(data, benchmark, split):
            raise UserError(f"{name} has no {split} files, expected {where_to_put(benchmark, data, benchmark.shots)}")
    return HarnessTasks(benchmark, data, whole=True)


def _of_file(path: Path, data: Path | None) -> list[Part]:
    """Return the parts that a file lists, or the suite that it is."""
    if not path.is_file():
        raise UserError(f"preset is {str(path)!r}, expected {', '.join(PRESETS)} or a file")
    listed = _list(path)
    if listed is None:
        return [_suite(path)]
    if not listed:
        raise UserError(f"{path} is an empty list, expected benchmarks, perplexity or suites")
    return [_entry(entry, f"{path}, entry {number}", path, data) for number, entry in enumerate(listed, 1)]


def _list(path: Path) -> list[Any] | None:
    """Return the list of a YAML file; None if it is a suite (.jsonl, or YAML of another kind)."""
    if path.suffix == ".jsonl":
        return None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise UserError(f"{path} cannot be read ({cause_of(e)}), expected YAML") from None
    return content if isinstance(content, list) else None


def _entry(entry: Any, where: str, path: Path, data: Path | None) -> Part:
    """Return the part of an entry: a name, a suite's file, or an object with `task` and `shots`."""
    settings = entry if isinstance(entry, dict) else {"task": entry}
    name, shots = settings.get("task"), settings.get("shots")
    if unknown := set(settings) - {"task", "shots"}:
        raise UserError(f"{where} has {', '.join(map(str, sorted(unknown, key=str)))}, expected task and shots")
    if shots is not None and (type(shots) is not int or shots < 0):
        raise UserError(f"{where}: shots is {shots!r}, expected a whole number, 0 or more")
    if name in benchmarks():
        return _listed(benchmarks()[name], shots, where, data)
    if shots is not None:
        raise UserError(f"{where}: {name} takes no shots, only a benchmark does")
    if name == "perplexity":
        return Perplexity(required=True)
    if isinstance(name, str) and (path.parent / name).is_file():
        return _suite(path.parent / name)
    raise UserError(f"{where}: task is {name!r}, expected perplexity, {', '.join(ORDER)} or the file of a suite")


def _listed(benchmark: Benchmark, shots: int | None, where: str, data: Path | None) -> HarnessTasks:
    if data is None:
        raise UserError(f"{where}: {benchmark.name} needs its files, expected --data DIR")
    if shots and len(benchmark.splits) < 2:
        raise UserError(f"{where}: shots is {shots}, but {benchmark.name} has no examples, expected 0")
    return HarnessTasks(benchmark, data, shots)


def _suite(path: Path) -> Part:
    from fastgpt.evaluate.suite import suite_of

    return suite_of(path)
