"""What a run trains for: the loss of a batch, what it is a mean of, and its validation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from fastgpt.data import IGNORE, sequential
from fastgpt.data.batch import Batch
from fastgpt.data.shards import Tokens
from fastgpt.distributed.mesh import ALONE, Mesh

__all__ = ["Batch", "NextToken", "Objective", "Task", "mean_over"]


class Objective(Protocol):
    """The loss of a batch, and what a step's loss is the mean over.

    Attributes:
        unit: what `counted` counts, in the singular ("token", "pair").
        figures: names of values that are logged with each step's loss, as means over the units.
    """

    @property
    def unit(self) -> str: ...

    @property
    def figures(self) -> tuple[str, ...]: ...

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Return sums over the units of a batch, (1 + figures,) fp32: the loss, then the figures without gradients.
        Must not wait for the device."""

    def counted(self, batch: Batch) -> Tensor:
        """Return the units of a batch that count, () int64. A step's loss is the mean over those of all its batches, so
        a unit weighs the same in any micro-batch."""


class Task(Objective, Protocol):
    """An objective with its validation; `fastgpt train` has NextToken, fastgpt/finetune the others."""

    def validate(self, run: Any, batches: int | None) -> dict[str, float]:
        """Return "val_loss" and other figures, by name, over the first `batches` micro-batches (None: all) of the
        validation data. The model of `run`, a training.run.Run, is in training mode before and after."""

    def watch(self, row: dict[str, Any]) -> list[str]:
        """Return sentences on trouble that the values of a step show."""


class NextToken:
    """Prediction of the next token."""

    unit = "token"
    figures: tuple[str, ...] = ()

    def loss(self, model: Any, batch: Batch) -> Tensor:
        ids, targets, doc_ids, positions, _ = batch
        loss: Tensor = model(ids, targets, doc_ids=doc_ids, positions=positions, reduction="sum")
        return loss.view(1)

    def counted(self, batch: Batch) -> Tensor:
        return (batch.targets != IGNORE).sum()

    def validate(self, run: Any, batches: int | None) -> dict[str, float]:
        """Return the loss on the validation data and on each of its sources, in nats per token."""
        cfg, mesh = run.cfg, run.mesh
        each = None if batches is None else -(-batches // mesh.world)
        options: dict[str, Any] = dict(max_batches=each, rank=mesh.rank, world=mesh.world, device=run.device)
        eot = run.data.eot if cfg.doc_masks else None

        def loss_on(tokens: Tokens) -> float:
            windows = sequential(tokens, cfg.sequences, cfg.block_size, eot=eot, **options)
            return mean_over(run.task, run.model, (Batch(*window) for window in windows), mesh)["loss"]

        losses = {f"val_loss.{name}": loss_on(tokens) for name, tokens in run.val_sources.items()}
        return {"val_loss": loss_on(run.data.val), **losses}

    def watch(self, row: dict[str, Any]) -> list[str]:
        return []


def mean_over(task: Objective, model: Any, batches: Iterable[Batch], mesh: Mesh = ALONE) -> dict[str, float]:
    """Return the means of "loss" and the task's figures over the units of batches, with dropout off. Each process of
    the mesh has batches of its own, as many as the others."""
    sums, counted = [0.0] * (1 + len(task.figures)), 0
    model.eval()
    with torch.no_grad():
        for batch in batches:
            sums = [a + b for a, b in zip(sums, task.loss(model, batch).tolist())]
            counted += int(task.counted(batch))
    model.train()
    *sums, total = [sum(values) for values in zip(*mesh.gather([*sums, counted]))]
    return {name: value / total for name, value in zip(("loss", *task.figures), sums)}
