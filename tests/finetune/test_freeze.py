from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_models import model_of
from torch.utils.flop_counter import FlopCounterMode

from fastgpt import ops
from fastgpt.core.errors import UserError
from fastgpt.finetune.freeze import freeze, freeze_first, layer_decay
from fastgpt.finetune.lora import Lora, add_lora
from fastgpt.finetune.quantised import quantise_base
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
    cases = ([["nrom"], "'nrom' is found in no"], [["("], "is not a regular"], [["."], "no parameter is left"])
    for patterns, said in cases:
        with pytest.raises(UserError, match=said):
            freeze(model, patterns)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(UserError, match="freeze_first is 3, expected 0 to 2"):
        freeze_first(model, 3)
    with pytest.raises(UserError, match="layer_decay is 1.5"):
        layer_decay(model, 1.5)


def products(model: GPT) -> int:
    """Count the FLOP of the matrix products of a step per token, attention apart, as PyTorch's counter does."""
    ids = torch.arange(12).view(2, 6)
    with ops.use(linear="torch"), FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    found = counter.get_flop_counts()["Global"]
    return sum(found[op] for op in (torch.ops.aten.mm, torch.ops.aten.addmm) if op in found) // ids.numel()


FROZEN: dict[str, Callable[[GPT], object]] = {
    "nothing": lambda m: None,
    "embeddings": lambda m: freeze(m, ["wte|wpe"]),
    "three blocks": lambda m: freeze_first(m, 3),
    "all but the head": lambda m: freeze(m, ["blocks", "norm_f", "wte", "wpe"]),
    "adapters": lambda m: add_lora(m, Lora(rank=2)),
    "adapters over int8": lambda m: (quantise_base(m, "int8"), add_lora(m, Lora(rank=2))),
}


@pytest.mark.parametrize("what", FROZEN)
def test_flop_are_those_of_the_products_that_are_computed(what: str) -> None:
    """A step's input needs no gradient, which the formula does not know, so it is above the count by a layer at most;
    biases and norms multiply nothing."""
    model = model_of(tied=False, n_layers=4, width=64, vocab_size=64).float()
    FROZEN[what](model)
    passed = {"nothing": 4, "embeddings": 4, "three blocks": 1, "all but the head": 0}.get(what, 4)
    counted, formula = products(model), model.flops_per_token(6)["full"] - (16 + 8 * passed) * 64 * 6
    layer = 2 * 4 * 64 * 64
    assert 0 <= formula - counted <= layer + 0.03 * counted
