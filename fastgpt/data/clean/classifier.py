"""Quality classifier: logistic regression on hashed words and pairs of words, trained on good and bad samples.

    p(good | text) = sigmoid(bias + sum over features of weight * value)

The features of a text are the hashes of its words and pairs of words in lower case, cut to `bits` bits; the value of
each is 1 / sqrt(number of different features), so that length does not count. Training is AdaGrad (Duchi et al. 2011)
over single samples in a seeded order, with an L2 penalty. Sources of the idea: Brown et al. 2020 (arXiv 2005.14165,
appendix A) and Li et al. 2024 (arXiv 2406.11794), which train linear classifiers on reference texts and web texts.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fastgpt.core.errors import UserError
from fastgpt.data.clean.features import Features, mix, n_grams
from fastgpt.data.clean.step import State, Step

FORMAT = 1


@dataclass
class Classifier:
    """Weights of the classifier.

    Attributes:
        weights: (2**bits,) float32.
        bias: added to every score.
        bits: bits of a feature's hash.
        n: longest run of words that is a feature.
    """

    weights: NDArray[np.float32]
    bias: float
    bits: int
    n: int

    def features(self, features: Features) -> NDArray[np.intp]:
        """Return the different features of a text, rising."""
        hashes = [mix(n_grams(features.lowered, n)) >> np.uint64(64 - self.bits) for n in range(1, self.n + 1)]
        return np.unique(np.concatenate(hashes)).astype(np.intp)

    def _logit(self, at: NDArray[np.intp]) -> float:
        return self.bias + float(self.weights[at].sum(dtype=np.float64)) / max(len(at), 1) ** 0.5

    def score(self, features: Features) -> float:
        """Return the probability, from 0 to 1, that a text is like the good samples."""
        return float(1 / (1 + np.exp(-np.clip(self._logit(self.features(features)), -50, 50))))

    def save(self, path: Path) -> None:
        """Write the classifier to a .npz file, aside first."""
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with aside.open("wb") as file:
                np.savez_compressed(
                    file, weights=self.weights, settings=np.array([FORMAT, self.bits, self.n]), bias=self.bias
                )
            aside.replace(path)
        except OSError as e:
            aside.unlink(missing_ok=True)
            raise UserError(f"{path}: cannot write the classifier, {e.strerror}") from None

    @classmethod
    def load(cls, path: str | Path) -> Classifier:
        """Read a classifier; nothing is unpickled."""
        try:
            with np.load(path, allow_pickle=False) as file:
                version, bits, n = file["settings"].tolist()
                weights, bias = file["weights"].astype(np.float32), float(file["bias"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
            reason = getattr(e, "strerror", None) or "not a classifier"
            raise UserError(f"{path}: {reason}, expected a file of `fastgpt data classifier train`") from None
        if version != FORMAT or weights.shape != (1 << bits,):
            raise UserError(f"{path}: classifier of format {version}, expected {FORMAT}; train it again")
        return cls(weights, bias, bits, n)


def auc(good: NDArray[np.float64], bad: NDArray[np.float64]) -> float:
    """Return the probability that a good sample scores above a bad one; ties count one half."""
    ordered = np.sort(bad)
    below, upto = np.searchsorted(ordered, good, "left"), np.searchsorted(ordered, good, "right")
    return float((below + upto).sum() / (2 * max(len(good) * len(bad), 1)))


@dataclass
class Training:
    """A trained classifier with its accuracy on samples held out.

    Attributes:
        classifier: trained on the other samples.
        accuracy: share of the held-out samples on the right side of 0.5, each class weighing one half.
        auc: area under the ROC curve, on the held-out samples.
        held_out: number of good and bad samples held out.
    """

    classifier: Classifier
    accuracy: float
    auc: float
    held_out: tuple[int, int]


def train(good: Sequence[str], bad: Sequence[str], *, bits: int = 18, n: int = 2, epochs: int = 5, rate: float = 0.5,
          l2: float = 1e-6, share: float = 0.2, seed: int = 0) -> Training:  # fmt: skip
    """Train on good and bad samples.

    Args:
        good, bad: texts; equal texts are used once, and at least 10 different ones of each kind are needed.
        bits: bits of a feature's hash; the file has 2**bits weights.
        n: longest run of words that is a feature.
        epochs: passes over the samples.
        rate: learning rate of AdaGrad.
        l2: penalty on the squared weights.
        share: share of the samples held out; which ones depends on the seed and the text alone.
        seed: seed of the order and of the held-out samples.

    Raises:
        UserError: too few samples, or no sample of a kind in one of the two parts.
    """
    classifier = Classifier(np.zeros(1 << bits, dtype=np.float32), 0.0, bits, n)
    trained: list[tuple[NDArray[np.intp], int]] = []
    held: tuple[list[NDArray[np.intp]], list[NDArray[np.intp]]] = ([], [])
    for label, (kind, texts) in enumerate((("bad", bad), ("good", good))):
        different = sorted(set(texts))
        if len(different) < 10:
            raise UserError(f"classifier: {len(different)} different {kind} samples, expected at least 10")
        ranked = sorted(different, key=lambda t: hashlib.blake2b(f"{seed}{t}".encode("utf-8", "replace")).digest())
        cut = min(max(int(len(ranked) * share), 1), len(ranked) - 1)
        held[label].extend(classifier.features(Features(t)) for t in ranked[:cut])
        trained += [(classifier.features(Features(t)), label) for t in ranked[cut:]]
    _fit(classifier, trained, epochs, rate, l2, seed)
    scores = [np.array([classifier._logit(at) for at in part]) for part in held]
    accuracy = (float((scores[0] < 0).mean()) + float((scores[1] >= 0).mean())) / 2
    return Training(classifier, accuracy, auc(scores[1], scores[0]), (len(held[1]), len(held[0])))


def _fit(classifier: Classifier, samples: list[tuple[NDArray[np.intp], int]], epochs: int, rate: float, l2: float,
         seed: int) -> None:  # fmt: skip
    """Fit the weights; each class has the same total weight."""
    squares, bias_square = np.full(len(classifier.weights), 1e-6, dtype=np.float32), 1e-6
    positive = sum(label for _, label in samples)
    class_weight = (len(samples) / (2 * (len(samples) - positive)), len(samples) / (2 * positive))
    random = np.random.default_rng(seed)
    for _ in range(epochs):
        for i in random.permutation(len(samples)).tolist():
            at, label = samples[i]
            logit = classifier._logit(at)
            error = class_weight[label] * (1 / (1 + np.exp(-np.clip(logit, -50, 50))) - label)
            gradient = (error / max(len(at), 1) ** 0.5 + l2 * classifier.weights[at]).astype(np.float32)
            squares[at] += gradient * gradient
            classifier.weights[at] -= np.float32(rate) * gradient / np.sqrt(squares[at])
            bias_square += error * error
            classifier.bias -= float(rate * error / bias_square**0.5)


@dataclass
class Quality(Step):
    """Drop texts that a trained classifier scores below a threshold.

    Attributes:
        path: file of `fastgpt data classifier train`.
        min_score: smallest score that passes, from 0 to 1.
    """

    name: ClassVar[str] = "classifier"
    rules: ClassVar[tuple[str, ...]] = ("classifier",)
    path: str = ""
    min_score: float = 0.5

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError("path is missing, expected a file of `fastgpt data classifier train`")
        self._classifier = Classifier.load(self.path)

    def decide(self, features: Features, state: State) -> str | None:
        return "classifier" if self._classifier.score(features) < self.min_score else None
