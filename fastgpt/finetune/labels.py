"""Labels of a data set: the names that a head has for them, their numbers, and weights of classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from fastgpt.core.errors import UserError

Where = Callable[[int], str]  # the place of row i, for errors


def settle_labels(values: Iterable[Any], given: Sequence[Any] | None = None) -> tuple[str, ...]:
    """Return the names of labels: those given, or the different values of the data, numbers in their order and text in
    that of the alphabet. Lists, as tags have them, count by element.

    Raises:
        UserError: numbers and text are mixed.
    """
    if given is not None:
        return tuple(map(label_name, given))
    found = {label for value in values for label in (value if isinstance(value, list) else [value])}
    numbers = [label for label in found if not isinstance(label, str)]
    if numbers and len(numbers) < len(found):
        texts = sorted(label for label in found if isinstance(label, str))
        raise UserError(f"labels are numbers like {numbers[0]} and text like {texts[0]!r}, expected one of both")
    return tuple(map(label_name, sorted(found)))


def label_name(label: Any) -> str:
    """Return the name of a label; 1.0 is '1'."""
    return str(int(label) if isinstance(label, (bool, float)) and label == int(label) else label)


def class_ids(values: Sequence[Any], labels: Sequence[str], where: Where) -> list[Any]:
    """Return the classes of label values, or lists of classes for lists of labels.

    Raises:
        UserError: a label is not one of the head's.
    """
    number = {name: i for i, name in enumerate(labels)}

    def of(label: Any, i: int) -> int:
        name = label_name(label)
        if name not in number:
            known = ", ".join(labels[:20]) + (", ..." if len(labels) > 20 else "")
            raise UserError(f"{where(i)} has label {name!r}, which the head does not have, expected one of {known}")
        return number[name]

    return [[of(v, i) for v in value] if isinstance(value, list) else of(value, i) for i, value in enumerate(values)]


def targets(values: Sequence[Any], where: Where) -> list[float]:
    """Return the numbers of a regression.

    Raises:
        UserError: a label is not a finite number.
    """
    numbers = []
    for i, value in enumerate(values):
        try:
            numbers.append(float(value))
        except (TypeError, ValueError):
            numbers.append(float("nan"))
        if not np.isfinite(numbers[-1]):
            raise UserError(f"{where(i)} has label {value!r}, expected a finite number")
    return numbers


def balanced(classes: Iterable[int], labels: Sequence[str]) -> list[float]:
    """Return weights n / (L * n_c), so that all classes weigh the same in the whole data, as scikit-learn's "balanced".

    Raises:
        UserError: a class has no example.
    """
    counts = np.bincount(np.fromiter(classes, np.int64), minlength=len(labels))
    if len(missing := np.flatnonzero(counts == 0)):
        raise UserError(f"class_weights balanced: label {labels[missing[0]]!r} has no example in the training data")
    return [float(w) for w in counts.sum() / (len(labels) * counts)]
