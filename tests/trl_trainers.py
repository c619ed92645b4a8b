"""Trainers of TRL on tiny models, and their losses and gradients in the layout of fastgpt."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import make
from preference_rows import VOCAB
from torch import Tensor

from fastgpt.models.gpt import GPT
from fastgpt.models.weights import load_pretrained

LIMIT = 2e-5  # relative, of fp32 sums in another order; a wrong sign or mask is above 1e-2
PLAIN: dict[str, Any] = dict(bf16=False, use_cpu=True, gradient_checkpointing=False, report_to=[])


def words() -> Any:
    """Return a tokenizer of transformers with VOCAB words, w0 and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w1", bos_token="w2")


def models(family: str, folder: Path) -> tuple[Any, GPT]:
    """Return the same tiny random model, without dropout, in transformers and in fastgpt."""
    torch.manual_seed(1)
    theirs = make(family)
    theirs.save_pretrained(folder / "model")
    theirs.config._name_or_path = str(folder / "model")  # where TRL loads a reference model from
    return theirs, load_pretrained(folder / "model")


def in_our_layout(theirs: Any, values: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Return tensors named as the parameters of `theirs` (its weights or their gradients) as ours are named."""
    carrier = copy.deepcopy(theirs)
    carrier.load_state_dict(values, strict=False)
    carrier.save_pretrained(folder / "values")
    return dict(load_pretrained(folder / "values").named_parameters())


def gradients(theirs: Any, folder: Path) -> dict[str, Tensor]:
    """Return the gradients of `theirs` under our names."""
    return in_our_layout(theirs, {name: p.grad for name, p in theirs.named_parameters()}, folder)


def compare(
    task: Any, trainer: Any, ours: GPT, folder: Path, batches: list[tuple[Any, dict[str, Tensor]]]
) -> list[dict[str, float]]:
    """Take 10 AdamW steps with TRL's trainer; before each, give our model the same weights and compare loss and
    gradients. Return our figures of each step."""
    theirs, figures = trainer.model.train(), []
    optimizer = torch.optim.AdamW(theirs.parameters(), 1e-2)
    for batch, features in batches:
        ours.load_state_dict(in_our_layout(theirs, theirs.state_dict(), folder))
        theirs.zero_grad()
        expected = trainer.compute_loss(theirs, features)
        expected.backward()
        values = task.loss(ours, batch) / task.counted(batch)
        ours.zero_grad()
        values[0].backward()
        assert values[0].item() == pytest.approx(expected.item(), rel=LIMIT)
        wanted = gradients(theirs, folder)
        for name, p in ours.named_parameters():
            assert p.grad is not None
            bound = LIMIT * (wanted[name].norm() + 0.01 * max(w.norm() for w in wanted.values()))
            assert (p.grad - wanted[name]).norm() <= bound, name
        figures.append(dict(zip(task.figures, values[1:].tolist())))
        optimizer.step()
    return figures
