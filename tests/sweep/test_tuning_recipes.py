"""The grids of docs/tuning.md: every run has valid settings, and what they hold equal is equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastgpt.models.gpt import GPT
from fastgpt.sweep.spec import load
from fastgpt.training.config import TrainConfig, load_config

FOLDER = Path(__file__).parents[2] / "recipes" / "tuning"


def configs(name: str) -> dict[str, TrainConfig]:
    spec = load(FOLDER / f"{name}.yaml")
    return {variant: load_config(spec.arguments(given)) for variant, given in spec.named().items()}


def parameters(config: TrainConfig) -> int:
    model = {**vars(config.model), "vocab_size": config.vocab_size}
    with torch.device("meta"):
        return GPT(type(config.model)(**model)).num_params()


def test_activations_have_equal_parameters() -> None:
    found = configs("architecture")
    biases = 2 * (2 * 256 - 384)  # of `up` in two blocks
    assert round(parameters(found["base"]), -3) == 279_000  # as the page says
    assert parameters(found["swiglu"]) == parameters(found["base"]) + biases


def test_batches_have_equal_tokens() -> None:
    assert {c.batch_tokens * c.most_steps for c in configs("batch").values()} == {102_400}


@pytest.mark.parametrize("name", ["optimizer", "batch"])
def test_every_grid_has_the_same_baseline(name: str) -> None:
    assert next(iter(configs(name).values())) == configs("architecture")["base"]


def test_the_default_is_compared_at_its_own_size() -> None:
    base, muon, faster = configs("default").values()
    assert (base.model, base.block_size, base.batch_tokens) == (
        load_config([]).model,
        load_config([]).block_size,
        load_config([]).batch_tokens,
    )
    assert base.model == muon.model == faster.model and base.optimizer == "adamw"
    assert muon.optimizer == faster.optimizer == "muon" and base.lr == muon.lr < faster.lr


def test_mup_is_the_only_difference_at_the_larger_width() -> None:
    found = configs("mup")
    for rate in ("1e-3", "32e-3"):
        plain, scaled = found[f"width-128-lr-{rate}"], found[f"width-128-mup-lr-{rate}"]
        assert (plain.lr, plain.model.width, plain.model.mup_base_width) == (scaled.lr, 128, None)
        assert (scaled.model.d_head, scaled.model.mup_base_width) == (16, found[f"width-32-lr-{rate}"].model.width)
