"""The weights of fastgpt.models.gpt: initial values, parameter groups, sizes of published models."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from fastgpt import ops
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT

SMALL = ModelConfig(n_layers=2, n_heads=4, width=32, vocab_size=50, vocab_multiple=32, block_size=24)
LLAMA: dict[str, Any] = dict(
    norm="rms",
    activation="swiglu",
    positions="rope",
    qkv_bias=False,
    proj_bias=False,
    mlp_bias=False,
    tied=False,
)


def test_initial_weights_follow_the_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = GPT(SMALL, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    with ops.use(all="torch"):
        again = GPT(SMALL, generator=torch.Generator().manual_seed(3))
    other = GPT(SMALL, generator=torch.Generator().manual_seed(4))
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert not torch.equal(first.wte.weight, other.wte.weight)
    torch.manual_seed(7)
    globally = GPT(SMALL)
    torch.manual_seed(7)
    assert torch.equal(GPT(SMALL).wte.weight, globally.wte.weight)


def test_initial_weights_are_gpt2s() -> None:
    model = GPT(dataclasses.replace(SMALL, width=256, n_layers=8), generator=torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.equal(p, torch.full_like(p, float("norm" in name and name.endswith("weight")))), name
        else:
            expected = 0.02 / (math.sqrt(16) if name.endswith(("proj.weight", "down.weight")) else 1)
            assert abs(float(p.detach().std()) / expected - 1) < 0.03, name


def test_param_groups_spare_norms_and_biases() -> None:
    model = GPT(SMALL)
    decayed, spared = model.param_groups(0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert sum(p.numel() for g in (decayed, spared) for p in g["params"]) == model.num_params()
    assert {id(p) for p in spared["params"]} == {
        id(p) for n, p in model.named_parameters() if "norm" in n or n.endswith("bias")
    }


def test_flops_in_both_conventions() -> None:
    with torch.device("meta"):
        model = GPT(ModelConfig(vocab_size=50257, block_size=1024))
        untied = GPT(ModelConfig(vocab_size=50257, block_size=1024, tied=False))
    n, wpe, pairs = 124_475_904, 1024 * 768, 12 * 768 * 1024
    assert model.flops_per_token(1024) == {"full": 6 * (n - wpe) + 12 * pairs, "causal": 6 * n + 6 * pairs}
    assert untied.flops_per_token(1024) == model.flops_per_token(1024)


FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "gpt2": (124_439_808, dict(vocab_size=50257, block_size=1024)),
    "EleutherAI/gpt-neo-125m": (
        125_198_592,
        dict(vocab_size=50257, block_size=2048, attn_scale=1.0, window=[None, 256], qkv_bias=False),
    ),
    "EleutherAI/gpt-j-6b": (
        6_050_882_784,
        dict(
            n_layers=28,
            n_heads=16,
            width=4096,
            vocab_size=50400,
            block_size=2048,
            parallel="shared",
            positions="rope",
            rotary_dim=64,
            rope_interleaved=True,
            qkv_bias=False,
            proj_bias=False,
            tied=False,
            head_bias=True,
        ),
    ),
    "EleutherAI/pythia-160m": (
        162_322_944,
        dict(
            vocab_size=50304,
            block_size=2048,
            parallel="separate",
            positions="rope",
            rotary_dim=16,
            activation="gelu",
            tied=False,
        ),
    ),
    "meta-llama/Meta-Llama-3-8B": (
        8_030_261_248,
        LLAMA
        | dict(n_layers=32, n_heads=32, n_kv_heads=8, width=4096, mlp_width=14336, vocab_size=128256, block_size=8192),
    ),
    "mistralai/Mistral-7B-v0.1": (
        7_241_732_096,
        LLAMA
        | dict(
            n_layers=32,
            n_heads=32,
            n_kv_heads=8,
            width=4096,
            mlp_width=14336,
            vocab_size=32000,
            block_size=8192,
            window=4096,
        ),
    ),
    "Qwen/Qwen2.5-0.5B": (
        494_032_768,
        LLAMA
        | dict(
            n_layers=24,
            n_heads=14,
            n_kv_heads=2,
            width=896,
            mlp_width=4864,
            vocab_size=151936,
            block_size=4096,
            qkv_bias=True,
            tied=True,
        ),
    ),
    "Qwen/Qwen3-0.6B": (
        596_049_920,
        LLAMA
        | dict(
            n_layers=28,
            n_heads=16,
            n_kv_heads=8,
            head_dim=128,
            width=1024,
            mlp_width=3072,
            vocab_size=151936,
            block_size=4096,
            qk_norm=True,
            tied=True,
        ),
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_hosts_published_models(name: str) -> None:
    published, options = FAMILIES[name]
    with torch.device("meta"):
        model = GPT(ModelConfig(**{"vocab_multiple": 1, **options}))
    assert model.num_params() == published
