"""Losses and gradients of supervised fine-tuning equal those of TRL's SFTTrainer over 10 steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from preference_rows import packed, rows
from trl_trainers import PLAIN, compare, models, words

from fastgpt.training.task import NextToken

trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sft(family: str, tmp_path: Path) -> None:
    """Ours packs several documents into a row; TRL pads each. Completions alone are learned."""
    theirs, ours = models(family, tmp_path)
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # SFTTrainer leaves it on
    args = trl.SFTConfig(str(tmp_path / "out"), **PLAIN, dataset_kwargs={"skip_prepare_dataset": True})
    data = datasets.Dataset.from_dict({"input_ids": [[3, 4, 5]]})
    trainer = trl.SFTTrainer(theirs, args=args, train_dataset=data, processing_class=words())
    batches = []
    for step in range(10):
        texts = [(row.prompt, row.first) for row in rows(5, seed=step)]
        ids = [torch.tensor(prompt + completion) for prompt, completion in texts]
        labels = [torch.tensor([-100] * len(prompt) + completion) for prompt, completion in texts]
        padded = torch.nn.utils.rnn.pad_sequence
        masks = padded([torch.ones_like(text) for text in ids], True, 0)
        features = {"input_ids": padded(ids, True, 0), "labels": padded(labels, True, -100), "attention_mask": masks}
        batches.append((packed(texts, list(range(5)), step % 2 == 1), features))
    compare(NextToken(), trainer, ours, tmp_path, batches)
