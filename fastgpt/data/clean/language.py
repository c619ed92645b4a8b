"""Language filter by py3langid, on the beginning of a text."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Literal

from fastgpt.core.errors import UserError
from fastgpt.data.clean.features import Features
from fastgpt.data.clean.step import State, Step


@lru_cache(maxsize=1)
def identifier() -> Any:
    """Return py3langid's identifier with normalised scores; loading its model takes about half a second."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UserError(
            "the rule language needs py3langid: `pip install 'fastgpt[data]'`, or set language: false"
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def classify(text: str, min_length: int = 50, min_confidence: float = 0.65) -> str:
    """Return the language code of a text, or "unknown".

    py3langid answers any text, also one without a single feature. So a text with fewer than `min_length` letters and
    digits, or with a confidence below `min_confidence`, or without linguistic content ("zxx"), is "unknown".
    """
    if sum(map(str.isalnum, text)) < min_length:
        return "unknown"
    code, confidence = identifier().classify(text)
    return "unknown" if code == "zxx" or confidence < min_confidence else str(code)


@dataclass
class Language(Step):
    """Drop texts in other languages than those named.

    Attributes:
        keep: codes of ISO 639-1, such as ["en", "de"]; empty keeps all.
        unknown: what to do with texts whose language is unknown.
        min_length: letters and digits that a text needs for an answer.
        min_confidence: confidence that an answer needs.
        characters: characters at the beginning of the text that are looked at.
    """

    name: ClassVar[str] = "language"
    rules: ClassVar[tuple[str, ...]] = ("language", "language_unknown")
    keep: list[str] = field(default_factory=lambda: ["en"])
    unknown: Literal["keep", "drop"] = "drop"
    min_length: int = 50
    min_confidence: float = 0.65
    characters: int = 1000

    def __post_init__(self) -> None:
        labels = identifier().labels
        if wrong := next((code for code in self.keep if code not in labels), None):
            raise UserError(f"keep has {wrong!r}, which is not one of py3langid's languages: {', '.join(labels)}")

    def decide(self, features: Features, state: State) -> str | None:
        text = features.text[: self.characters]
        code = classify(text, self.min_length, self.min_confidence)
        state.count(f"language.{code}")
        if code == "unknown":
            return "language_unknown" if self.unknown == "drop" and self.keep else None
        return "language" if self.keep and code not in self.keep else None
