"""Losses, figures and gradients of DPO, IPO, KTO and ORPO equal those of TRL's trainers, over 10 steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_rows import Row, pair_batch, pair_features, rated_batch, rated_features, rows
from torch import Tensor
from trl_trainers import PLAIN, compare, models, words

from fastgpt.finetune.preference import DPO, KTO, ORPO
from fastgpt.models.gpt import GPT

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


def trainer_of(kind: str, theirs: Any, folder: Path, **options: Any) -> Any:
    """Return a trainer of TRL over `theirs` with a data set that is not used."""
    import trl
    from trl.experimental import orpo

    where: Any = orpo if kind == "ORPO" else trl
    rated = dict(completion=["w5 w6", "w7 w8"], label=[True, False])
    data = dict(prompt=["w3 w4", "w5"]) | (
        rated if kind == "KTO" else dict(chosen=["w5 w6", "w7"], rejected=["w7", "w8 w9"])
    )
    config = getattr(where, f"{kind}Config")(output_dir=str(folder / "out"), **PLAIN, **options)
    extra: dict[str, Any] = {} if kind == "ORPO" else {"ref_model": type(theirs)(theirs.config)}
    return getattr(where, f"{kind}Trainer")(
        theirs, args=config, train_dataset=datasets.Dataset.from_dict(data), processing_class=words(), **extra
    )


class _StoredDPO(DPO):
    """DPO with the reference of each batch in the batch itself."""

    def referenced(self, batch: Any) -> Tensor:
        return batch.extra["reference"]


class _StoredKTO(KTO):
    def referenced(self, batch: Any) -> Tensor:
        return batch.extra["reference"]


def batches_of(
    task: Any, trainer: Any, ours: GPT, pack: Callable[..., Any], features: Callable[..., Any]
) -> list[tuple[Any, dict[str, Tensor]]]:
    """Return batches for 10 steps, with reference log-probabilities of the start weights on both sides."""
    found = []
    for step in range(10):
        data = rows(3, seed=step)
        batch = pack(data, shift=step % 2 == 1)
        with torch.no_grad():
            reference = task.policy(ours, batch)
        batch = batch._replace(extra={**batch.extra, "reference": reference})
        found.append((batch, trainer.data_collator(features(data, reference))))
    return found


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # name -> our options, those of TRL
    "sigmoid": ({}, {}),
    "sigmoid, gpt2": ({}, {}),
    "robust": (dict(loss_type="robust", label_smoothing=0.1), dict(loss_type=["robust"], label_smoothing=0.1)),
    "length norm": (dict(length_norm=True, beta=2.0), dict(loss_type=["sigmoid_norm"], beta=2.0)),
    "ipo-mean": (dict(loss_type="ipo-mean"), dict(loss_type=["ipo"])),
}
DPO_METRICS = {
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
    "chosen_reward": "rewards/chosen",
    "chosen_log_prob": "logps/chosen",
    "rejected_log_prob": "logps/rejected",
}
ORPO_METRICS = {
    "nll": "nll_loss",
    "log_odds": "log_odds_chosen",
    "accuracy": "rewards/accuracies",
    "chosen_log_prob": "logps/chosen",
    "rejected_log_prob": "logps/rejected",
}


def same_figures(figures: list[dict[str, float]], metrics: dict[str, list[float]], names: dict[str, str]) -> None:
    """Compare from the second step on: before the first, margins are 0 but for rounding, so accuracy is chance."""
    for ours, theirs in names.items():
        assert [f[ours] for f in figures[1:]] == pytest.approx(metrics[theirs][1:], rel=1e-4, abs=1e-4), ours


@pytest.mark.parametrize("variant", VARIANTS)
def test_dpo(variant: str, tmp_path: Path) -> None:
    options, trl_options = VARIANTS[variant]
    theirs, ours = models("gpt2" if "gpt2" in variant else "llama", tmp_path)
    task, trainer = _StoredDPO(**options), trainer_of("DPO", theirs, tmp_path, **trl_options)
    trainer.precompute_ref_logps = True  # read them from the batch
    figures = compare(task, trainer, ours, tmp_path, batches_of(task, trainer, ours, pair_batch, pair_features))
    same_figures(figures, trainer._metrics["train"], DPO_METRICS)


def test_kto(tmp_path: Path) -> None:
    theirs, ours = models("llama", tmp_path)
    task = _StoredKTO(good_weight=1.5)
    trainer = trainer_of("KTO", theirs, tmp_path, desirable_weight=1.5)
    trainer.precompute_ref_logps = True
    figures = compare(task, trainer, ours, tmp_path, batches_of(task, trainer, ours, rated_batch, rated_features))
    same_figures(figures, trainer._metrics["train"], {"kl": "kl"})
    assert max(f["kl"] for f in figures) > 0.01


def orpo_features(data: list[Row], tokenizer_pad: int = 0) -> dict[str, Tensor]:
    """Return what ORPOTrainer's collator returns for pairs."""
    features = {}
    for side, name in (("first", "chosen"), ("second", "rejected")):
        texts = [torch.tensor(row.prompt + getattr(row, side)) for row in data]
        labels = [torch.tensor([-100] * len(row.prompt) + getattr(row, side)) for row in data]
        for key, values, pad in (("input_ids", texts, tokenizer_pad), ("labels", labels, -100)):
            features[f"{name}_{key}"] = torch.nn.utils.rnn.pad_sequence(values, True, pad)
        masks = [torch.ones_like(text) for text in texts]
        features[f"{name}_attention_mask"] = torch.nn.utils.rnn.pad_sequence(masks, True, 0)
    return features


def test_orpo(tmp_path: Path) -> None:
    theirs, ours = models("gpt2", tmp_path)
    trainer = trainer_of("ORPO", theirs, tmp_path)
    batches = [(pair_batch(data, i % 2 == 1), orpo_features(data)) for i in range(10) for data in [rows(3, seed=i)]]
    figures = compare(ORPO(nll="batch"), trainer, ours, tmp_path, batches)
    same_figures(figures, trainer._stored_metrics["train"], ORPO_METRICS)
