"""Weights of classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from fastgpt.core.errors import UserError


def balanced(classes: Iterable[int], labels: Sequence[str]) -> list[float]:
    """Return weights n / (L * n_c), so that all classes weigh the same in the whole data, as scikit-learn's "balanced".

    Raises:
        UserError: a class has no example.
    """
    counts = np.bincount(np.fromiter(classes, np.int64), minlength=len(labels))
    if len(missing := np.flatnonzero(counts == 0)):
        raise UserError(f"class_weights balanced: label {labels[missing[0]]!r} has no example in the training data")
    return [float(w) for w in counts.sum() / (len(labels) * counts)]
