"""Patched models in bf16: logits, losses and every gradient of the ten families, by the rule of parity."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hf_parity import InFp64, excess
from patched_pairs import TEN, make, patched, step, tokens
from torch import Tensor

import fastgpt

BATCHES = 4


def several(model: Any) -> dict[str, Tensor]:
    """Return what steps over several batches give, side by side: the error of one small tensor is a random number."""
    runs = [step(model, input_ids=tokens(seed=seed), labels=tokens(seed=seed + 50)) for seed in range(BATCHES)]
    return {n: torch.stack([run[n].double() for run in runs]) for n in runs[0]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TEN)
def test_bf16(kind: str) -> None:
    model = make(kind).bfloat16()
    base = several(copy.deepcopy(model))
    with InFp64():
        truth = several(copy.deepcopy(model).double())
    ours = patched(copy.deepcopy(model))
    bad = excess(several(ours), base, truth, torch.finfo(torch.bfloat16).eps)
    assert not bad, bad
    with fastgpt.ops.use(strict=True):  # every op takes bf16
        step(ours)
    assert all(p.dtype == torch.bfloat16 for p in ours.parameters())
