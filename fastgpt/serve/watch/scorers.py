"""Raters of answers: a function of the user's, or a model with a task head that `fastgpt finetune` trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastgpt.core.errors import UserError
from fastgpt.data.load import load_tokenizer
from fastgpt.evaluate.safety.scorer import open_scorer
from fastgpt.finetune.head_files import load_pretrained
from fastgpt.finetune.heads import sequence_scores
from fastgpt.models.weights.huggingface import CONFIG

BATCH = 16  # texts in one pass of a classifier


@dataclass(frozen=True)
class Scorer:
    """A named rating of answers.

    Attributes:
        rate: returns a number for each answer, from the prompts and the answers.
        threshold: an answer has the flag from this number on.
    """

    name: str
    rate: Callable[[Sequence[str], Sequence[str]], list[float]]
    threshold: float


def open_rater(name: str, what: str, threshold: float) -> Scorer:
    """Open a scorer.

    Args:
        what: FILE.py:FUNCTION, called with `prompts` and `completions`; or RUN:LABEL, a classifier and the label whose
            probability is the rating; or RUN, a regression.

    Raises:
        UserError: there is neither, or the model has no such label or another head.
    """
    path, _, rest = what.rpartition(":")
    if path.endswith(".py"):
        return Scorer(name, open_scorer(what, f"--flag-scorer {name}"), threshold)
    folder, label = (Path(path), rest) if path and not Path(what).is_dir() else (Path(what), None)
    if not folder.is_dir():
        raise UserError(f"--flag-scorer {name}: {what} is neither FILE.py:FUNCTION nor RUN:LABEL")
    return Scorer(name, Classifier(folder, label), threshold)


class Classifier:
    """A model with a task head, on the CPU. A text longer than its context is rated in parts, by the highest rating.

    Args:
        path: a run of `fastgpt finetune`, or a folder that transformers loads.
        label: whose probability is the rating; None for a regression, whose rating is its number.

    Raises:
        UserError: there is no model, no tokenizer, another kind of head, or no such label.
    """

    def __init__(self, path: Path, label: str | None) -> None:
        folder = path if (path / CONFIG).is_file() else path / "model"
        if not (folder / CONFIG).is_file():
            raise UserError(f"{path} has no model with a task head, expected a finished run of `fastgpt finetune`")
        self.model, self.head = load_pretrained(folder, dtype=torch.float32)
        self.tokenizer = load_tokenizer(folder)
        labels = self.head.labels
        if self.head.kind == "tags":
            raise UserError(f"{path} labels tokens, expected a classification or a regression")
        if labels and label not in labels:
            asked = f"no label {label!r}" if label else "several labels"
            raise UserError(f"{path} has {asked}, expected {path}:LABEL with one of {', '.join(labels)}")
        if label and not labels:
            raise UserError(f"{path} has no labels, expected its path without :{label}")
        self.label = labels.index(label) if label else None

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Return the rating of each completion."""
        n = self.model.max_positions - len(self.tokenizer.prefix)
        parts, owners = list[list[int]](), list[int]()
        for owner, text in enumerate(completions):
            ids = self.tokenizer.encode(text).tolist() or [self.tokenizer.eot]
            for at in range(0, len(ids), n):
                parts.append([*self.tokenizer.prefix, *ids[at : at + n]])
                owners.append(owner)
        ratings = np.concatenate([self._rate(parts[at : at + BATCH]) for at in range(0, len(parts), BATCH)])
        highest = np.full(len(completions), -np.inf)
        np.maximum.at(highest, owners, ratings)
        return [float(value) for value in highest]

    @torch.inference_mode()
    def _rate(self, parts: list[list[int]]) -> np.ndarray:
        """Return the ratings (n,) of token sequences."""
        ids = torch.full((len(parts), max(map(len, parts))), self.head.pad_id or 0)  # (n, T)
        sequence = torch.full_like(ids, -1)
        for i, part in enumerate(parts):
            ids[i, : len(part)] = torch.tensor(part)
            sequence[i, : len(part)] = i
        scores = sequence_scores(self.model, self.head, ids, sequence, len(parts))  # (n, L)
        values = scores[:, 0] if self.label is None else scores.softmax(-1)[:, self.label]
        return values.numpy()
