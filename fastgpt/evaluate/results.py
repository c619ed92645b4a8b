"""The results of an evaluation: figures with standard errors, and the value of every item, as JSON and as a table."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.core.errors import UserError
from fastgpt.core.folders import write_text

VERSION = 1  # of the JSON


@dataclass(frozen=True)
class Figure:
    """A metric of a task.

    Attributes:
        task: name of the task, or of the source of a perplexity.
        metric: "acc", "acc_norm", "bits_per_byte", ...
        value: in the unit of the metric; shares are 0 to 1.
        n: items it is the mean of.
        stderr: standard error of the mean; None where there is none, as for one item.
        chance: value of a model that guesses; None where there is none.
        shots: examples in each prompt.
        higher_is_better: which direction is an improvement; None: neither.
        low, high: 95 % interval, where it is not value -+ 1.96 stderr; else None.
    """

    task: str
    metric: str
    value: float
    n: int
    stderr: float | None = None
    chance: float | None = None
    shots: int = 0
    higher_is_better: bool | None = True
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Items:
    """The value of a metric for every item of a task, in the order of its file, for paired comparisons.

    Attributes:
        ids: an id of each item that depends on its contents alone.
        values: in the unit of the metric; the figure is their mean.
        weights: of the values in that mean, as the bytes of a document for its bits per byte; None: all equal.
    """

    task: str
    metric: str
    ids: list[str]
    values: list[float]
    weights: list[float] | None = None


@dataclass
class Results:
    """What an evaluation found.

    Attributes:
        model: name, folder, step, tokens and fingerprint of the weights.
        preset: name or file of the preset.
        figures: one entry for each task and metric.
        items: one entry for each task and metric that has a value per item.
        truncated: task -> prompts that did not fit into the context.
        seconds: task -> duration.
        notes: sentences for the reader.
        versions: package -> version.
        date: day, in ISO 8601.
    """

    model: dict[str, Any]
    preset: str
    figures: list[Figure] = field(default_factory=list)
    items: list[Items] = field(default_factory=list)
    truncated: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""

    def save(self, path: Path) -> None:
        """Write the results as JSON, whole or not at all."""
        text = json.dumps({"version": VERSION, **dataclasses.asdict(self)}, indent=1, allow_nan=False)
        write_text(path, text + "\n")

    def figure(self, task: str, metric: str) -> Figure | None:
        """Return a figure, or None."""
        return next((f for f in self.figures if (f.task, f.metric) == (task, metric)), None)


def load_results(path: str | Path) -> Results:
    """Read results that `Results.save` wrote.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        version = values.pop("version")
        if version != VERSION:
            raise UserError(f"{path}: version {version!r} of the results of an evaluation, expected {VERSION}")
        values["figures"] = [Figure(**f) for f in values["figures"]]
        values["items"] = [Items(**i) for i in values["items"]]
        return Results(**values)
    except OSError as e:
        raise UserError(f"cannot read the results {path}: {e.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not the results of an evaluation, expected JSON of `fastgpt eval`") from None


def mean(task: str, metric: str, values: list[float], **more: Any) -> Figure:
    """Return the mean of the items' values, with its standard error (of the sample; None for one item)."""
    n = len(values)
    value = sum(values) / n
    stderr = math.sqrt(sum((v - value) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
    return Figure(task, metric, value, n, stderr, **more)


def item_id(item: Any) -> str:
    """Return an id that depends on the contents of an item alone, a value that JSON can hold: 16 hex digits."""
    text = json.dumps(item, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def ratio(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> tuple[float, float | None]:
    """Return sum(a) / sum(b) of (N,), and its standard error over items by the delta method; None for one item."""
    value, n = float(a.sum() / b.sum()), len(a)
    error = math.sqrt(float(((a - value * b) ** 2).sum()) * n / (n - 1)) / float(b.sum()) if n > 1 else None
    return value, error
