"""GRPO's losses, figures and gradients equal those of TRL's trainer on the same samples, rewards and probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from preference_rows import rows, sample_batch, sample_features
from trl_trainers import PLAIN, compare, models, words

from fastgpt.finetune.grpo import GRPO, advantages

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

KINDS = ("ids", "mask")
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # loss -> options on both sides, and TRL's alone
    "grpo": ({}, {}),
    "bnpo": (dict(epsilon_high=0.3), {}),
    "dr_grpo": (dict(beta=0.1, temperature=0.7), {}),
    "dapo": (dict(beta=0.2), dict(use_bias_correction_kl=False)),
}


@pytest.mark.parametrize("loss_type", VARIANTS)
def test_grpo(loss_type: str, tmp_path: Path) -> None:
    options, more = VARIANTS[loss_type]
    theirs, ours = models("llama", tmp_path)
    config = trl.GRPOConfig(
        output_dir=str(tmp_path / "out"), loss_type=loss_type, max_completion_length=12, num_generations=4,
        per_device_train_batch_size=4, gradient_accumulation_steps=1, **options, **more, **PLAIN,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        theirs, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["w3", "w4"]}), processing_class=words(),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    task = GRPO(loss_type=loss_type, max_new_tokens=12, kl_correction=not more, **options)  # type: ignore[arg-type]
    batches = []
    for step in range(10):
        data, g = rows(4, seed=step), torch.Generator().manual_seed(step)
        lengths = torch.tensor([len(row.first) for row in data])
        shape = (4, int(lengths.max()))
        features = sample_features(data, advantages=torch.randn(4, generator=g))
        whole = [torch.cat([features[f"{part}_{kind}"] for part in ("prompt", "completion")], 1) for kind in KINDS]
        with torch.no_grad():
            now = trainer._get_per_token_logps_and_entropies(theirs, *whole, shape[1])[0]
        features["old_per_token_logps"] = now + 0.3 * torch.randn(shape, generator=g)
        features["ref_per_token_logps"] = now + 0.3 * torch.randn(shape, generator=g)
        extra = dict(advantage=features["advantages"], reward=torch.arange(4.0))
        extra |= {"old_log_probs": features["old_per_token_logps"], "ref_log_probs": features["ref_per_token_logps"]}
        batches.append((sample_batch(data, **extra, tokens_per_sample=lengths.float().mean()), features))
    figures = compare(task, trainer, ours, tmp_path, batches)
    assert figures[0]["reward"] == 1.5 and max(f["clipped"] for f in figures) > 0.1
    if "beta" in options:
        assert min(f["kl"] for f in figures) > 0.01


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(scale: Any) -> None:
    from trl.trainer.utils import nanstd

    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.5, float("nan"), -1.0, 0.0]])
    expected = rewards - rewards.nanmean(1, keepdim=True)
    if scale != "none":
        expected /= (nanstd(rewards, dim=1, keepdim=True) if scale == "group" else nanstd(rewards)) + 1e-4
    torch.testing.assert_close(advantages(rewards, scale), expected.nan_to_num(0.0))
