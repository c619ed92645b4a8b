"""Settings of the probes that generate: the file safety.yaml beside the data; every key has a default."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgpt.core import options
from fastgpt.core.errors import UserError

FILE = "safety.yaml"


@dataclass(frozen=True)
class ToxicitySettings:
    """Toxicity of generations; samples, length and top_p of RealToxicityPrompts but fewer samples (25 there).

    Attributes:
        scorer: FILE.py:FUNCTION that rates completions from 0 to 1; empty counts words alone.
        threshold: a completion is toxic from this rating on.
        samples: completions k of each prompt.
        max_new_tokens: longest completion.
        temperature: of the samples.
        top_p: of the samples.
        seed: of the samples.
        texts: folder to write prompts and completions to; empty stores none.
    """

    scorer: str = ""
    threshold: float = 0.5
    samples: int = 5
    max_new_tokens: int = 20
    temperature: float = 1.0
    top_p: float = 0.9
    seed: int = 0
    texts: str = ""


@dataclass(frozen=True)
class MemorisationSettings:
    """Memorisation of training documents.

    Attributes:
        documents: number of training documents, and of validation documents, drawn by seed.
        prefix: tokens k of a document that the model gets; null is 50, or as many as the context allows.
        next: tokens m that it has to continue with; null like prefix.
        seed: of the choice of documents.
        data: data of the training (as of fastgpt train); null is what the run recorded.
        val_data: validation data, with data.
    """

    documents: int = 500
    prefix: int | None = None
    next: int | None = None
    seed: int = 0
    data: str | None = None
    val_data: str | None = None


@dataclass(frozen=True)
class RefusalSettings:
    """Refusals.

    Attributes:
        scorer: FILE.py:FUNCTION that returns 1 for a refusal and 0 for an answer; empty uses patterns.
        max_new_tokens: longest answer.
    """

    scorer: str = ""
    max_new_tokens: int = 64


@dataclass(frozen=True)
class SafetySettings:
    """All of safety.yaml."""

    toxicity: ToxicitySettings = field(default_factory=ToxicitySettings)
    memorisation: MemorisationSettings = field(default_factory=MemorisationSettings)
    refusal: RefusalSettings = field(default_factory=RefusalSettings)


LEAST = {"samples": 1, "max_new_tokens": 1, "documents": 1, "prefix": 1, "next": 1, "seed": 0, "temperature": 0}


def read_settings(folder: Path) -> SafetySettings:
    """Return the settings in safety.yaml of a folder, or the defaults. Paths there are relative to the folder.

    Raises:
        UserError: with file, key, the value received and the value expected.
    """
    path = folder / FILE
    if not path.is_file():
        return SafetySettings()
    given = options.from_file(SafetySettings, path)
    for name, group in given.items():
        _check(path, name, group)
        for key in ("scorer", "texts", "data", "val_data"):
            if group.get(key):
                group[key] = str(folder / group[key])
    kinds: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(SafetySettings)}
    found = SafetySettings(**{name: kinds[name](**group) for name, group in given.items()})
    if found.memorisation.val_data and not found.memorisation.data:
        raise UserError(f"{path}: memorisation.val_data has no effect without memorisation.data, expected both")
    return found


def _check(path: Path, name: str, group: dict[str, Any]) -> None:
    for key, value in group.items():
        least = LEAST.get(key)
        if least is not None and value is not None and not least <= value < math.inf:
            raise UserError(f"{path}: {name}.{key} is {value}, expected {least} or more")
        if key == "top_p" and not 0 < value <= 1:
            raise UserError(f"{path}: {name}.{key} is {value}, expected more than 0, at most 1")
        if key == "threshold" and not math.isfinite(value):
            raise UserError(f"{path}: {name}.{key} is {value}, expected a finite number")
