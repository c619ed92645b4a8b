"""Language filter by py3langid, on the beginning of a text.

py3langid (Lui and Baldwin 2012, ACL demos) walks an automaton over the bytes, counts the features that its states stand
for, and adds their log-probabilities: score(language) = bias + sum over features of log(1 + count) * weight. No pattern
of the automaton is longer than DEPTH bytes, so the state after a byte follows from the last DEPTH bytes alone.
`Identifier` therefore walks from all positions at once, in DEPTH steps of numpy.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fastgpt.core.errors import UserError
from fastgpt.data.clean.features import Features
from fastgpt.data.clean.step import State, Step

KNOWN = ("0.4.0",)  # versions of py3langid whose tables Identifier reads
DEPTH = 6  # length of the longest pattern in them, in bytes


class Identifier:
    """The model of py3langid.

    Attributes:
        labels: codes of the languages.
    """

    def __init__(self) -> None:
        try:
            from py3langid.langid import MODEL_FILE, LanguageIdentifier
        except ImportError:
            raise UserError("py3langid is missing: `pip install 'fastgpt[data]'`, or set language: false") from None
        self._model: Any = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        self.labels: list[str] = self._model.labels
        self._fast = version("py3langid") in KNOWN
        if self._fast:
            self._next = np.asarray(self._model.tk_nextmove)
            self._rows = np.asarray(self._model.tk_row, dtype=np.int64) << 8
            # The model's weights are 16-bit. Rows are converted at their first use; pages of other rows take no memory.
            self._weights = np.empty(self._model.nb_ptc.shape, dtype=np.float32)
            self._ready = np.zeros(len(self._weights), dtype=np.bool_)
            self._features = np.asarray(self._model.tk_output, dtype=np.int32)

    def classify(self, text: str) -> tuple[str, float]:
        """Return the language and a confidence from 0 to 1, as py3langid does."""
        if not self._fast:
            code, confidence = self._model.classify(text)
            return str(code), float(confidence)
        text = text.lower() if text.isupper() else text
        data = unicodedata.normalize("NFC", text).encode("utf-8", "surrogatepass")
        scores = self._scores(np.frombuffer(data, dtype=np.uint8)) / max(len(data), 1) ** 0.5
        scores = np.exp(scores - scores.max())
        scores /= scores.sum()
        for first, second in self._model._alias_pairs:  # two scripts of one language
            scores[first] += scores[second]
            scores[second] = 0
        best = int(scores.argmax())
        return str(self._model.nb_classes[best]), float(scores[best])

    def _scores(self, data: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the score of each language for bytes (n,)."""
        states = np.zeros(len(data), dtype=np.int64)
        for k in range(min(DEPTH, len(data)) - 1, -1, -1):
            states[k:] = self._next[self._rows[states[k:]] + data[: len(data) - k]]
        found = self._features[states]
        features, counts = np.unique(found[found >= 0], return_counts=True)
        if not len(features):
            return np.zeros(len(self._model.nb_pc), dtype=np.float32)
        if len(new := features[~self._ready[features]]):
            self._weights[new] = self._model.nb_ptc[new]
            self._ready[new] = True
        # A sum over rows, not a matrix product: its order does not depend on the BLAS.
        return np.add.reduce(np.log1p(counts, dtype=np.float32)[:, None] * self._weights[features]) + self._model.nb_pc


@lru_cache(maxsize=1)
def identifier() -> Identifier:
    """Return the identifier; loading its model takes about half a second."""
    return Identifier()


def classify(text: str, min_length: int = 50, min_confidence: float = 0.65) -> str:
    """Return the language code of a text, or "unknown".

    py3langid answers any text, also one without a single feature. So a text with fewer than `min_length` letters and
    digits, or with a confidence below `min_confidence`, or without linguistic content ("zxx"), is "unknown".
    """
    if sum(map(str.isalnum, text[: 4 * min_length])) < min_length and sum(map(str.isalnum, text)) < min_length:
        return "unknown"
    code, confidence = identifier().classify(text)
    return "unknown" if code == "zxx" or confidence < min_confidence else code


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
