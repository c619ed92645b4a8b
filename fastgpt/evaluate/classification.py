"""Metrics of classification, regression and token labels, in numpy.

Counts of classes go into a confusion matrix (K, K) int64: row i, column j counts examples of class i predicted as j.
Undefined values are settled so that every metric is a finite number:

- precision of a class that is never predicted, recall of a class that never occurs, and F1 of both at once: 0, as
  scikit-learn's zero_division=0;
- macro and weighted averages go over the classes that occur or are predicted, as scikit-learn's without `labels`;
- Matthews' coefficient with one class only, and correlations with a constant side: 0 (SciPy's are NaN).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def confusion_matrix(true: npt.ArrayLike, predicted: npt.ArrayLike, classes: int) -> Ints:
    """Count pairs of classes, both (n,) in [0, classes).

    Raises:
        ValueError: the lengths differ, or a class is out of range.
    """
    t, p = np.asarray(true, np.int64).reshape(-1), np.asarray(predicted, np.int64).reshape(-1)
    if t.shape != p.shape:
        raise ValueError(f"confusion_matrix: got {len(t)} true and {len(p)} predicted classes, expected as many")
    if len(t) and not (0 <= min(t.min(), p.min()) and max(t.max(), p.max()) < classes):
        raise ValueError(f"confusion_matrix: classes must be in [0, {classes})")
    counts = np.bincount(t * classes + p, minlength=classes * classes)
    return counts.astype(np.int64).reshape(classes, classes)


def _ratio(a: npt.ArrayLike, b: npt.ArrayLike) -> Floats:
    """Divide elementwise; 0 where the divisor is 0."""
    a, b = np.broadcast_arrays(np.asarray(a, np.float64), np.asarray(b, np.float64))
    return np.divide(a, b, out=np.zeros_like(a), where=b != 0)


def per_class(matrix: Ints) -> dict[str, Floats]:
    """Return precision, recall, f1 and support (how often the class occurs) of each class, each (K,)."""
    hits, occurs, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    return {
        "precision": _ratio(hits, predicted),
        "recall": _ratio(hits, occurs),
        "f1": _ratio(2 * hits, occurs + predicted),
        "support": occurs.astype(np.float64),
    }


def classification(matrix: Ints) -> dict[str, float]:
    """Return accuracy, macro_f1, weighted_f1 and matthews. Micro F1 is the accuracy, since each example has one class.

    Raises:
        ValueError: the matrix counts no example.
    """
    n, hits = int(matrix.sum()), int(np.trace(matrix))
    if n == 0:
        raise ValueError("classification: the confusion matrix counts no example")
    f1, support = per_class(matrix)["f1"], matrix.sum(1)
    seen = support + matrix.sum(0) > 0
    return {
        "accuracy": hits / n,
        "macro_f1": float(f1[seen].mean()),
        "weighted_f1": float((f1 * support).sum() / n),
        "matthews": matthews(matrix),
    }


def matthews(matrix: Ints) -> float:
    """Return Matthews' correlation coefficient for any number of classes (Gorodkin 2004)."""
    m = matrix.astype(np.float64)
    n, hits, occurs, predicted = m.sum(), np.trace(m), m.sum(1), m.sum(0)
    product = np.sqrt(n**2 - (occurs**2).sum()) * np.sqrt(n**2 - (predicted**2).sum())
    return float(_ratio(hits * n - occurs @ predicted, product))


def regression(true: npt.ArrayLike, predicted: npt.ArrayLike) -> dict[str, float]:
    """Return mse, mae, pearson and spearman of values, both (n,).

    Raises:
        ValueError: the lengths differ, or there are no values.
    """
    t, p = np.asarray(true, np.float64).reshape(-1), np.asarray(predicted, np.float64).reshape(-1)
    if t.shape != p.shape or not len(t):
        raise ValueError(f"regression: got {len(t)} true and {len(p)} predicted values, expected as many, at least one")
    return {
        "mse": float(((t - p) ** 2).mean()),
        "mae": float(np.abs(t - p).mean()),
        "pearson": pearson(t, p),
        "spearman": pearson(ranks(t), ranks(p)),
    }


def pearson(a: Floats, b: Floats) -> float:
    """Return the linear correlation of a and b, both (n,); 0 if either is constant."""
    if (a == a[0]).all() or (b == b[0]).all():  # a mean that is rounded would leave a little variance
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip((a @ b) / (np.linalg.norm(a) * np.linalg.norm(b)), -1.0, 1.0))


def ranks(values: Floats) -> Floats:
    """Return the ranks of values (n,) from 1 on; equal values share the mean of theirs."""
    _, number, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[number]


Span = tuple[int, int, str]  # first token, token after the last, type


def spans(tags: Sequence[str]) -> set[Span]:
    """Return the spans of tags like B-name, I-name and O. As in CoNLL's scorer, I-name also begins a span if no span of
    its type precedes it."""
    found: set[Span] = set()
    start, kind = 0, ""
    for i, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if kind and not (mark == "I" and name == kind):
            found.add((start, i, kind))
            kind = ""
        if mark in ("B", "I") and not kind:
            start, kind = i, name
    return found


def is_bio(labels: Iterable[str]) -> bool:
    """Return whether every label is O or a type after B- or I-."""
    return all(label == "O" or (label[:2] in ("B-", "I-") and len(label) > 2) for label in labels)


def span_scores(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return span_precision, span_recall and span_f1 over the tags of several texts: a span counts as found if its
    borders and its type are right."""
    pairs = [(spans(t), spans(p)) for t, p in zip(true, predicted, strict=True)]
    hits, n_true, n_predicted = (
        sum(len(t & p) for t, p in pairs),
        sum(len(t) for t, _ in pairs),
        sum(len(p) for _, p in pairs),
    )
    return {
        "span_precision": float(_ratio(hits, n_predicted)),
        "span_recall": float(_ratio(hits, n_true)),
        "span_f1": float(_ratio(2 * hits, n_true + n_predicted)),
    }


def table(matrix: Ints, labels: Sequence[str]) -> str:
    """Return precision, recall, F1 and support of each class as text; '-' for a class that neither occurs nor is
    predicted."""
    figures = per_class(matrix)
    width = max(map(len, [*labels, "class"]))
    lines = [f"{'class':<{width}}  precision  recall      f1  support"]
    for i, label in enumerate(labels):
        if matrix[i].sum() + matrix[:, i].sum():
            p, r, f = (f"{figures[name][i]:.4f}" for name in ("precision", "recall", "f1"))
        else:
            p = r = f = "-"
        lines.append(f"{label:<{width}}  {p:>9}  {r:>6}  {f:>6}  {int(figures['support'][i]):>7}")
    return "\n".join(lines)


def confusion_text(matrix: Ints, labels: Sequence[str]) -> str:
    """Return a confusion matrix as text: a row for each true class, a column for each predicted one."""
    cell = max(len(str(matrix.max(initial=0))), *map(len, labels))
    corner = "true \\ predicted"
    width = max(len(corner), *map(len, labels))
    lines = [f"{corner:<{width}}" + "".join(f"  {label:>{cell}}" for label in labels)]
    for label, row in zip(labels, matrix.tolist(), strict=True):
        lines.append(f"{label:<{width}}" + "".join(f"  {count:>{cell}}" for count in row))
    return "\n".join(lines)
