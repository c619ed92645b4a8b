"""The task of a run: the loss of fastgpt/finetune's tasks, validated on sets that are kept by name."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.core.errors import UserError
from fastgpt.data.batch import Batch
from fastgpt.finetune.base import Teaching
from fastgpt.finetune.classify import Classify, Pairwise, Regress, Tag
from fastgpt.finetune.config import FinetuneConfig
from fastgpt.finetune.data import Data
from fastgpt.finetune.distil import Distil
from fastgpt.finetune.grpo import GRPO
from fastgpt.finetune.heads import HeadConfig
from fastgpt.finetune.labels import balanced
from fastgpt.finetune.preference import DPO, KTO, ORPO, Referenced, Watch
from fastgpt.finetune.reference import NAME, reference
from fastgpt.finetune.rewarded import RewardCheck
from fastgpt.finetune.rollouts import Reward
from fastgpt.finetune.teacher_cache import TeacherCache, cached
from fastgpt.models.gpt import GPT
from fastgpt.training.task import NextToken, Objective, mean_over

HEADS: dict[str, Any] = {"classify": Classify, "regress": Regress, "tag": Tag, "reward": Pairwise}
KINDS: dict[str, Any] = {"classify": "classification", "regress": "regression", "tag": "tags", "reward": "reward"}


@dataclass
class Check:
    """A validation set: its task, which for a preference loss has reference values of its own, and its loader."""

    task: Any
    loader: Any

    def __call__(self, run: Any, batches: int | None) -> dict[str, float]:
        if hasattr(self.task, "report"):  # a task with a head, which has its own metrics
            self.task.validation = self.loader.once
            figures: dict[str, float] = self.task.validate(run, batches)
            return figures
        means = mean_over(self.task, run.model, self.loader.once(batches))
        return {"val_loss": means.pop("loss"), **means}


class Tuned:
    """A task with validation sets by name; "val_loss" is the mean of their losses, replay apart."""

    def __init__(self, task: Objective, checks: dict[str, Any], watch: Watch | None = None) -> None:
        self.task, self.checks, self.watched = task, checks, watch
        self.unit, self.figures = task.unit, task.figures

    def loss(self, model: Any, batch: Batch) -> Tensor:
        return self.task.loss(model, batch)

    def counted(self, batch: Batch) -> Tensor:
        return self.task.counted(batch)

    def validate(self, run: Any, batches: int | None) -> dict[str, float]:
        """Return the mean loss, and of each set its loss and its figures, by "val_" or the set's name."""
        found = {name: check(run, batches) for name, check in self.checks.items()}
        own = [name for name in found if name != "replay"]
        row = {"val_loss": sum(found[name]["val_loss"] for name in own) / len(own)}
        for name, figures in found.items():
            if len(found) == 1:
                row |= {f"val_{key}": value for key, value in figures.items() if key != "val_loss"}
            else:
                row |= {f"{Path(name).stem}.{key}": value for key, value in figures.items()}
        return row

    def watch(self, row: dict[str, Any]) -> list[str]:
        return [] if self.watched is None else self.watched(row)

    def reports(self) -> list[str]:
        """Return the tables of the last validation, if the task makes some."""
        return [
            report for check in self.checks.values() if (report := getattr(getattr(check, "task", None), "report", ""))
        ]


def head_config(cfg: FinetuneConfig, data: Data) -> HeadConfig | None:
    """Return the head that the task needs; None for the LM head."""
    if cfg.task not in KINDS:
        return None
    pooling: Any = {} if cfg.task == "tag" else {"pooling": cfg.pooling}
    labels = data.labels if cfg.task in ("classify", "tag") else ()
    return HeadConfig(KINDS[cfg.task], labels, pad_id=data.tokenizer.eot, **pooling)


def build_task(
    cfg: FinetuneConfig,
    data: Data,
    model: GPT,
    head: HeadConfig | None,
    block: int,
    folder: Path,
    taught_by: Teaching | None,
    rewards: list[Reward],
    loader: Any,
) -> Tuned:
    """Build the task of a run on the model as it starts, with its validation sets.

    Args:
        block: tokens T of a row.
        folder: of the run; reference log-probabilities and a teacher's most likely tokens are stored there.
        taught_by: the teacher of distil.
        rewards: of grpo.
        loader: of the training sets; None with grpo.

    Raises:
        UserError: the settings, the data or the teacher do not fit the model.
    """
    held = {} if cfg.task == "grpo" else data.checks(cfg, block, model.wte.weight.device)
    if taught_by is not None and not cfg.written:
        task: Any = _distil(cfg, model, taught_by, [loader, *held.values()], folder)
    else:
        task = _task(cfg, data, head)
    if hasattr(task, "prepare"):
        task.prepare(model)
    if isinstance(task, GRPO):
        limits = (data.tokenizer, cfg.max_new_tokens, block, cfg.micro_batch)
        return Tuned(task, {name: RewardCheck(items, rewards, *limits) for name, items in data.val.items()})
    checks: dict[str, Any] = {name: Check(task, loader) for name, loader in held.items()}
    if isinstance(task, Referenced):
        task = _referenced(task, model, loader, data.train, folder / NAME)
        for i, (name, check) in enumerate(checks.items()):
            path = folder / f"validation-{i}-{NAME}"
            check.task = _referenced(task, model, check.loader, {name: data.val[name]}, path)
    return Tuned(task, checks, Watch() if cfg.task == "dpo" else None)


def _distil(cfg: FinetuneConfig, model: GPT, taught_by: Teaching, loaders: list[Any], folder: Path) -> Distil:
    """Return the task with the teacher, or with the cache of its most likely tokens in the data of the loaders.

    Raises:
        UserError: teacher_top_k is larger than the vocabulary, or the cache cannot be written.
    """
    p, k = model.wte.weight, cfg.teacher_top_k
    load = partial(taught_by.load, p.dtype, p.device)
    options: dict[str, Any] = dict(ce=cfg.hard_share, kind=cfg.divergence, temperature=cfg.temperature)
    if not k:
        return Distil(load(), **options)
    if k > model.vocab_size:
        raise UserError(f"teacher_top_k is {k}, expected at most {model.vocab_size}, the vocabulary")
    batches = (batch for loader in loaders for batch in loader.once())
    identity = [cfg.teacher, taught_by.origin, str(p.dtype), [loader.state_dict()["data"] for loader in loaders]]
    path = cached(folder, load, batches, k, model.vocab_size, cfg.temperature, identity)
    return Distil(TeacherCache(path, p.device), **options)


def _task(cfg: FinetuneConfig, data: Data, head: HeadConfig | None) -> Any:
    options: dict[str, Any]
    if cfg.task == "dpo":
        return DPO(cfg.held, loss_type=cfg.loss_name, label_smoothing=cfg.label_smoothing, length_norm=cfg.length_norm)
    if cfg.task == "kto":
        return KTO(cfg.held, good_weight=cfg.good_weight, bad_weight=cfg.bad_weight)
    if cfg.task == "orpo":
        return ORPO(cfg.held)
    if cfg.task == "grpo":
        options = dict(epsilon=cfg.epsilon, beta=cfg.held, temperature=cfg.temperature)
        return GRPO(loss_type=cfg.loss_name, max_new_tokens=cfg.max_new_tokens, **options)
    if head is None:
        return NextToken()
    if cfg.task not in ("classify", "tag"):
        return HEADS[cfg.task](head)
    weights = _class_weights(data, head) if cfg.class_weights == "balanced" else None
    return HEADS[cfg.task](head, weights=weights, label_smoothing=cfg.label_smoothing)


def _class_weights(data: Data, head: HeadConfig) -> list[float]:
    counts: Counter[int] = Counter()
    for items in data.train.values():
        for item in items:
            counts.update([item.label] if isinstance(item.label, int) else [x for x in item.label.tolist() if x >= 0])
    return balanced(counts.elements(), head.labels)


@torch.no_grad()
def _referenced(task: Referenced, model: GPT, loader: Any, sets: dict[str, list[Any]], path: Path) -> Referenced:
    """Return the task with the log-probabilities of these sets under the model as it is, from the file or computed."""
    rows = sum(map(len, sets.values()))
    digest = loader.state_dict()["data"]
    model.eval()
    values = reference(path, task, model, loader.once(), rows, digest, resumed=False)
    found = replace(task, reference=values)
    found.check_start(model, next(iter(loader.once(1))))
    model.train()
    return found
