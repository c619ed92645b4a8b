"""Activations recomputed in backward: the same bits, less memory."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.nn import keep_gradients

GPT2 = dict(n_layers=3, n_heads=2, width=32, vocab_size=70, vocab_multiple=2, block_size=32)
LLAMA = {**GPT2, "n_heads": 4, "n_kv_heads": 2, "norm": "rms", "activation": "swiglu", "positions": "rope"}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "dropout": {**GPT2, "attn_dropout": 0.1, "resid_dropout": 0.1, "embed_dropout": 0.1},
    "llama": {**LLAMA, "tied": False, "qkv_bias": False, "mlp_bias": False},
    "neox": {**GPT2, "parallel": "separate"},
    "gptj": {**GPT2, "parallel": "shared", "activation": "relu2"},
    "gpt1": {**GPT2, "norm_placement": "post", "qk_norm": True},
}


def step(shape: dict[str, Any], level: Any, kept: bool) -> list[Tensor]:
    """Return loss and gradients."""
    model = GPT(ModelConfig(**shape), generator=torch.Generator().manual_seed(1))
    model.recompute = level
    if kept:
        keep_gradients(model, min_numel=1)
    ids = torch.randint(70, (3, 33), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)
    loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kept", [False, True], ids=["fresh", "kept"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_level_gives_the_same_bits(name: str, kept: bool) -> None:
    plain = step(SHAPES[name], "none", kept)
    for level in ("norms", "block"):
        got = step(SHAPES[name], level, kept)
        assert len(got) == len(plain) and all(torch.equal(a, b) for a, b in zip(got, plain, strict=True)), level


def held(shape: dict[str, Any], level: Any) -> int:
    """Return the bytes that a forward pass leaves allocated."""
    model = GPT(ModelConfig(**shape), generator=torch.Generator().manual_seed(1))
    model.recompute = level
    ids = torch.randint(70, (8, 32), generator=torch.Generator().manual_seed(2))
    model(ids, ids).backward()  # allocations of the first pass alone
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as seen:
        loss = model(ids, ids)
    size = sum(e.self_cpu_memory_usage for e in seen.key_averages())
    loss.backward()
    return int(size)


def test_levels_keep_less() -> None:
    """Per token and layer: norms, attention input and output, MLP: 16 widths; without the outputs of norms and GELU
    10; a block's input 2 (branch and residual)."""
    wide = {**GPT2, "width": 64, "n_layers": 6}
    none, norms, block = (held(wide, level) for level in ("none", "norms", "block"))
    layers = 6 * 8 * 32 * 64 * 4  # bytes of one width in all layers
    assert 5.5 < (none - norms) / layers < 7, (none, norms)
    assert 12 < (none - block) / layers < 15, (none, block)


@pytest.mark.parametrize("level", ["none", "norms", "block"])
def test_gradients_go_where_they_are_kept(level: Any) -> None:
    """A saved-tensor hook hands backward another tensor object, without the weight's buffer."""
    model = GPT(ModelConfig(**GPT2))
    model.recompute = level
    keep_gradients(model, min_numel=1)
    ids = torch.randint(70, (3, 32))
    model(ids, ids).backward()
    buffers = {n: p.grad_buffer for n, p in model.named_parameters() if p.dim() == 2}
    strays = [n for n, p in model.named_parameters() if n in buffers and p.grad is not buffers[n]]
    assert len(buffers) > 6 and not strays, strays


def test_nothing_outlives_backward_without_a_collection() -> None:
    """Activations in a reference cycle would stay until Python collects cycles, many steps later on a GPU."""
    model = GPT(ModelConfig(**GPT2))
    model.recompute = "norms"
    keep_gradients(model, min_numel=1)
    ids = torch.randint(70, (3, 32))
    model(ids, ids).backward()
    gc.collect()
    gc.disable()
    try:
        model.zero_grad()
        with torch.profiler.profile(profile_memory=True) as seen:
            model(ids, ids).backward()
            model.zero_grad()
    finally:
        gc.enable()
    left = sum(e.self_cpu_memory_usage for e in seen.key_averages())
    assert left < 3 * 32 * 32 * 4, f"{left} bytes, an activation or more"
