"""The probes whose files are in a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastgpt.core.errors import UserError
from fastgpt.evaluate.part import Note, Part
from fastgpt.evaluate.safety import bbq, crows_pairs, refusal, toxicity, winogender
from fastgpt.evaluate.safety.counterfactual import FILE as COUNTERFACTUAL
from fastgpt.evaluate.safety.counterfactual import FOLDER, Counterfactual
from fastgpt.evaluate.safety.memorisation import Memorisation
from fastgpt.evaluate.safety.settings import SafetySettings, read_settings


def parts_of(data: Path | None) -> list[Part]:
    """Return the probes whose files are in a folder, and memorisation, which needs none.

    Raises:
        UserError: the folder does not exist, or a file has another form; with file, line, key and what was expected.
    """
    if data is not None and not data.is_dir():
        raise UserError(f"{data} is not a folder, expected one with the files of the probes")
    parts: list[Part] = []
    missing: dict[str, str] = {}
    settings = SafetySettings() if data is None else read_settings(data)
    for name, files, opened in PROBES:
        found = [] if data is None else opened(data, settings)
        parts += found
        if not found:
            missing[name] = files
    parts.append(Memorisation(settings.memorisation))
    return [*parts, Note("missing", _said(data, missing))] if missing else parts


def _said(folder: Path | None, files: dict[str, str]) -> str:
    """Return which probes have no files, and where to put them."""
    where = "a folder, which --data names" if folder is None else str(folder)
    files_of = "; ".join(f"{name}: {file}" for name, file in files.items())
    return f"probes without files (put them into {where}): {files_of}"


def _crows_pairs(data: Path, settings: SafetySettings) -> list[Part]:
    path = data / crows_pairs.FILE
    return [crows_pairs.CrowsPairs(path)] if path.is_file() else []


def _bbq(data: Path, settings: SafetySettings) -> list[Part]:
    return [bbq.BBQ(data / bbq.FOLDER)] if any((data / bbq.FOLDER).glob("*.jsonl")) else []


def _winogender(data: Path, settings: SafetySettings) -> list[Part]:
    folder = data / winogender.FOLDER
    there = any((folder / name).is_file() for name in (winogender.SENTENCES, winogender.TEMPLATES))
    return [winogender.WinoGender(folder)] if there else []


def _counterfactual(data: Path, settings: SafetySettings) -> list[Part]:
    paths = [p for p in (data / COUNTERFACTUAL, *sorted((data / FOLDER).glob("*.yaml"))) if p.is_file()]
    return [Counterfactual(path) for path in paths]


def _toxicity(data: Path, settings: SafetySettings) -> list[Part]:
    prompts = [data / name for name in toxicity.PROMPTS if (data / name).is_file()]
    words = data / toxicity.WORDS if (data / toxicity.WORDS).is_file() else None
    if len(prompts) > 1:
        raise UserError(f"{data} has {' and '.join(toxicity.PROMPTS)}, expected one of them")
    if not prompts or (words is None and not settings.toxicity.scorer):
        return []
    return [toxicity.Toxicity(prompts[0], words, settings.toxicity)]


def _refusal(data: Path, settings: SafetySettings) -> list[Part]:
    path, patterns = data / refusal.FILE, data / refusal.PATTERNS
    if not path.is_file():
        return []
    return [refusal.Refusal(path, patterns if patterns.is_file() else None, settings.refusal)]


# name, files, and a function that opens those of a folder
PROBES: tuple[tuple[str, str, Callable[[Path, SafetySettings], list[Part]]], ...] = (
    ("crows_pairs", crows_pairs.FILE, _crows_pairs),
    ("bbq", f"{bbq.FOLDER}/*.jsonl", _bbq),
    ("winogender", f"{winogender.FOLDER}/{winogender.SENTENCES} or {winogender.TEMPLATES}", _winogender),
    ("counterfactual", f"{COUNTERFACTUAL} or {FOLDER}/*.yaml", _counterfactual),
    (
        "toxicity",
        f"{' or '.join(toxicity.PROMPTS)}, with {toxicity.WORDS} or toxicity.scorer in safety.yaml",
        _toxicity,
    ),
    ("refusal", refusal.FILE, _refusal),
)
