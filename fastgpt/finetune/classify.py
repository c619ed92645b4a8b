"""Tasks with a head in place of the LM head: Classify, Regress, Tag, and Pairwise for reward models.

A batch may hold several sequences per row. `Batch.extra` has

    sequence  (B, T) int64: the number of each token's sequence in the batch, -1 for padding
    index     (n,) int64: the row of each example in the data set; -1 pads
    labels    (n,) int64 classes (Classify) or fp32 values (Regress); (B, T) int64 classes, IGNORE elsewhere (Tag)
    margin    (n,) fp32, optional (Pairwise): by how much the chosen side of a pair should score higher

Example i is sequence i. With Pairwise, pair i has the sequences 2 i (chosen) and 2 i + 1 (rejected).
Sources: Bradley and Terry (1952) for pairs, with the margin of Touvron et al. (arXiv 2307.09288).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.core.errors import UserError
from fastgpt.data import IGNORE
from fastgpt.data.batch import Batch
from fastgpt.evaluate import classification as metrics
from fastgpt.finetune.heads import HeadConfig, sequence_scores, token_scores
from fastgpt.models.gpt import GPT

Validation = Callable[[int | None], Iterable[Batch]]  # the first so many batches of the validation data, None: all


class Outcome(NamedTuple):
    """What a model makes of a batch: a unit for each example, pair or labelled token.

    Attributes:
        losses: (n,) fp32.
        figures: (n,) each, in the order of the task's `figures`.
        counts: (n,) bool, False for padding.
        true, predicted: classes (n,) int64 or values (n,) fp32, for the metrics.
    """

    losses: Tensor
    figures: list[Tensor]
    counts: Tensor
    true: Tensor
    predicted: Tensor


@dataclass
class _Headed:
    """What the tasks share.

    Attributes:
        head: the model's head.
        validation: returns the batches to validate on; each call begins anew.
        report: a table of the last validation.
    """

    head: HeadConfig
    validation: Validation | None = None
    report: str = field(default="", init=False)

    kind: ClassVar[str]
    unit: str = field(default="example", init=False)
    figures: tuple[str, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        if self.head.kind != self.kind:
            raise UserError(f"the head is for {self.head.kind}, expected one for {self.kind}")

    def outcome(self, model: GPT, batch: Batch) -> Outcome:
        raise NotImplementedError

    def metrics(self, outcomes: list[tuple[Batch, Outcome]]) -> tuple[dict[str, float], str]:
        """Return figures and a report of batches and what the model makes of them, all on the CPU."""
        raise NotImplementedError

    def loss(self, model: GPT, batch: Batch) -> Tensor:
        """Return the sums of the loss and the figures over the units, (1 + figures,) fp32."""
        made = self.outcome(model, batch)
        rows = torch.stack([made.losses, *(figure.detach().float() for figure in made.figures)])
        return torch.where(made.counts, rows, 0.0).sum(1)

    def counted(self, batch: Batch) -> Tensor:
        """Return the units of a batch, () int64."""
        return (batch.extra["index"] >= 0).sum()

    @torch.no_grad()
    def validate(self, run: Any, batches: int | None) -> dict[str, float]:
        """Return val_loss, the mean loss of a unit, and the metrics over the first `batches` validation batches (None:
        all); `report` then shows them by class.

        Raises:
            UserError: there is no example to validate on.
        """
        model: GPT = run.model
        model.eval()
        data = self.validation(batches) if self.validation is not None else ()
        made = [(_cpu(batch), _cpu(self.outcome(model, batch))) for batch in data]
        model.train()
        n = sum(int(outcome.counts.sum()) for _, outcome in made)
        if n == 0:
            raise UserError(f"the validation data has no {self.unit}, expected at least one")
        total = sum(float(outcome.losses[outcome.counts].sum(dtype=torch.float64)) for _, outcome in made)
        figures, self.report = self.metrics(made)
        return {"val_loss": total / n, **figures}

    def _scores(self, model: GPT, batch: Batch, count: int) -> Tensor:
        where: dict[str, Any] = dict(doc_ids=batch.doc_ids, positions=batch.positions)
        return sequence_scores(model, self.head, batch.ids, batch.extra["sequence"], count, **where)


@dataclass
class _Classes(_Headed):
    """What tasks with classes share.

    The loss of a unit of class y is weight[y] times its cross-entropy. A step's loss is the mean over units, not over
    their weights, so that a weight means the same in any micro-batch.

    Attributes:
        weights: of each class, as `balanced` returns them; None: 1.
        label_smoothing: share of a label that is spread over all classes, as in torch's cross_entropy.
    """

    weights: Sequence[float] | None = None
    label_smoothing: float = 0.0
    figures: tuple[str, ...] = field(default=("accuracy",), init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        n = len(self.head.labels)
        if self.weights is not None and len(self.weights) != n:
            raise UserError(f"class_weights has {len(self.weights)} weights, expected {n}, one for each label")
        if self.weights is not None and not all(0 <= w < float("inf") for w in self.weights):
            raise UserError(f"class_weights is {list(self.weights)}, expected finite weights of 0 or more")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing is {self.label_smoothing:g}, expected 0 to less than 1")

    def _outcome(self, scores: Tensor, labels: Tensor) -> Outcome:
        """Return the outcome for scores (n, L) and labels (n,) int64, IGNORE for padding."""
        weights = None if self.weights is None else torch.tensor(self.weights, device=scores.device)
        options: dict[str, Any] = dict(weight=weights, label_smoothing=self.label_smoothing, ignore_index=IGNORE)
        losses = F.cross_entropy(scores, labels, reduction="none", **options)
        predicted = scores.argmax(-1)
        return Outcome(losses, [predicted == labels], labels != IGNORE, labels, predicted)

    def _matrix(self, outcomes: list[tuple[Batch, Outcome]]) -> metrics.Ints:
        true, predicted = _joined(outcomes)
        return metrics.confusion_matrix(true, predicted, len(self.head.labels))


@dataclass
class Classify(_Classes):
    """One class for each sequence, by cross-entropy. Figure: accuracy."""

    kind: ClassVar[str] = "classification"

    def outcome(self, model: GPT, batch: Batch) -> Outcome:
        extra = batch.extra
        labels = torch.where(extra["index"] >= 0, extra["labels"], IGNORE)
        return self._outcome(self._scores(model, batch, len(labels)), labels)

    def metrics(self, outcomes: list[tuple[Batch, Outcome]]) -> tuple[dict[str, float], str]:
        matrix = self._matrix(outcomes)
        text = f"{metrics.table(matrix, self.head.labels)}\n\n{metrics.confusion_text(matrix, self.head.labels)}"
        return metrics.classification(matrix), text


@dataclass
class Tag(_Classes):
    """One class for each labelled token, by cross-entropy. Figure: accuracy. Labels like B-name, I-name and O are also
    scored as spans."""

    kind: ClassVar[str] = "tags"
    unit: str = field(default="token", init=False)

    def outcome(self, model: GPT, batch: Batch) -> Outcome:
        scores = token_scores(model, batch.ids, doc_ids=batch.doc_ids, positions=batch.positions)
        return self._outcome(scores.flatten(0, 1), batch.extra["labels"].flatten())

    def counted(self, batch: Batch) -> Tensor:
        return (batch.extra["labels"] != IGNORE).sum()

    def metrics(self, outcomes: list[tuple[Batch, Outcome]]) -> tuple[dict[str, float], str]:
        matrix, names = self._matrix(outcomes), self.head.labels
        figures = metrics.classification(matrix)
        if metrics.is_bio(names):
            sides: tuple[list[list[str]], list[list[str]]] = ([], [])
            for batch, made in outcomes:
                number = batch.extra["sequence"].flatten()
                for i in number[made.counts].unique().tolist():
                    own = made.counts & (number == i)
                    for side, classes in zip(sides, (made.true, made.predicted), strict=True):
                        side.append([names[c] for c in classes[own].tolist()])
            figures |= metrics.span_scores(*sides)
        return figures, f"{metrics.table(matrix, names)}\n\n{metrics.confusion_text(matrix, names)}"


@dataclass
class Regress(_Headed):
    """A number for each sequence, by squared error. Figure: mae, the mean absolute error."""

    kind: ClassVar[str] = "regression"
    figures: tuple[str, ...] = field(default=("mae",), init=False)

    def outcome(self, model: GPT, batch: Batch) -> Outcome:
        extra = batch.extra
        counts = extra["index"] >= 0
        true = torch.where(counts, extra["labels"].float(), 0.0)
        predicted = self._scores(model, batch, len(true)).squeeze(1)
        error = predicted - true
        return Outcome(error**2, [error.abs()], counts, true, predicted)

    def metrics(self, outcomes: list[tuple[Batch, Outcome]]) -> tuple[dict[str, float], str]:
        figures = metrics.regression(*_joined(outcomes))
        return figures, "  ".join(f"{name} {value:.4f}" for name, value in figures.items())


@dataclass
class Pairwise(_Headed):
    """A reward for each sequence, so that chosen ones score above rejected ones: -log sigmoid(chosen - rejected -
    margin). Figures: accuracy (a tie is wrong) and margin, the mean of chosen - rejected."""

    kind: ClassVar[str] = "reward"
    unit: str = field(default="pair", init=False)
    figures: tuple[str, ...] = field(default=("accuracy", "margin"), init=False)

    def outcome(self, model: GPT, batch: Batch) -> Outcome:
        extra = batch.extra
        scores = self._scores(model, batch, 2 * len(extra["index"])).view(-1, 2)  # (n, 2)
        ahead = scores[:, 0] - scores[:, 1]
        losses = -F.logsigmoid(ahead - extra["margin"] if "margin" in extra else ahead)
        return Outcome(losses, [ahead > 0, ahead], extra["index"] >= 0, torch.ones_like(ahead), ahead)

    def metrics(self, outcomes: list[tuple[Batch, Outcome]]) -> tuple[dict[str, float], str]:
        _, ahead = _joined(outcomes)
        figures = {"accuracy": float((ahead > 0).mean()), "margin": float(ahead.mean())}
        return figures, f"{len(ahead)} pairs, {(ahead > 0).mean():.1%} in the right order"


def _cpu(values: Any) -> Any:
    """Return a Batch or an Outcome on the CPU."""
    if isinstance(values, Tensor):
        return values.cpu()
    if isinstance(values, Mapping):
        return {name: _cpu(value) for name, value in values.items()}
    if isinstance(values, list):
        return [_cpu(value) for value in values]
    return values if values is None else type(values)(*map(_cpu, values))


def _joined(outcomes: list[tuple[Batch, Outcome]]) -> tuple[np.ndarray, np.ndarray]:
    """Return what is true and what is predicted of all units that count."""
    true = torch.cat([made.true[made.counts] for _, made in outcomes])
    return true.numpy(), torch.cat([made.predicted[made.counts] for _, made in outcomes]).numpy()
