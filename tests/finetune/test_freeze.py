from __future__ import annotations

import pytest
import torch
from small_models import model_of

from fastgpt.core.errors import UserError
from fastgpt.finetune.freeze import freeze, freeze_first, layer_decay
from fastgpt.models.gpt import GPT

UNTIED = dict(tied=False)


def trained(model: GPT) -> set[str]:
    """Return the parameters that a backward pass gives a gradient."""
    ids = torch.arange(12).view(2, 6)
    model(ids, ids).backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


def test_freezing_by_pattern() -> None:
    model = model_of()
    every = {name for name, _ in model.named_parameters()}
    n = freeze(model, [r"norm", r"mlp\.down"])
    frozen = {name for name in every if "norm" in name or "mlp.down" in name}
    assert trained(model) == every - frozen
    assert n == sum(p.numel() for name, p in model.named_parameters() if name in frozen)


def test_freezing_the_first_blocks() -> None:
    model = model_of(tied=False)
    freeze_first(model, 1)
    assert trained(model) == {n for n, _ in model.named_parameters() if n.startswith(("blocks.1", "norm_f", "head"))}
    tied = model_of()
    freeze_first(tied, 2)
    assert trained(tied) == {"norm_f.weight", "norm_f.bias"}
    assert freeze_first(model_of(), 0) == 0


def test_ratios_fall_from_the_head_down() -> None:
    model = model_of(tied=False)
    groups = model.param_groups(0.1, layer_decay(model, 0.5))
    names = {p: name for name, p in model.named_parameters()}
    ratio = {names[p]: g["lr_ratio"] for g in groups for p in g["params"]}
    assert ratio["head.weight"] == ratio["norm_f.weight"] == 1.0
    assert ratio["blocks.1.mlp.up.weight"] == ratio["blocks.1.norm1.bias"] == 0.5
    assert ratio["blocks.0.attn.qkv.weight"] == 0.25
    assert ratio["wte.weight"] == ratio["wpe.weight"] == 0.125
    freeze_first(model, 1)
    assert layer_decay(model, 0.5) == {r"^blocks\.1\.": 0.5}
    model.param_groups(0.1, layer_decay(model, 0.5))  # refuses ratios without a parameter


def test_what_freezes_nothing_or_all_is_refused() -> None:
    model = model_of()
    for patterns, said in ([["nrom"], "'nrom' is found in no"], [["("], "no regular"], [["."], "no parameter is left"]):
        with pytest.raises(UserError, match=said):
            freeze(model, patterns)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(UserError, match="freeze_first is 3, expected 0 to 2"):
        freeze_first(model, 3)
    with pytest.raises(UserError, match="layer_decay is 1.5"):
        layer_decay(model, 1.5)
