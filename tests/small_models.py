"""Models of the generation tests: random ones in fp64, and one that says what a test wants."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch

from fastgpt.data import Tokenizer, train_tokenizer
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.training import checkpoint

ROPE: dict[str, Any] = dict(norm="rms", activation="swiglu", mlp_width=48, positions="rope", tied=False)
CASES: dict[str, dict[str, Any]] = {
    "learned": {},
    "rope, grouped heads": {**ROPE, "n_kv_heads": 2},
    "rope, window": {**ROPE, "window": 3},
    "alternating window": dict(window=[None, 3], attn_scale=1.0),
    "multi-query, head norm": {**ROPE, "n_kv_heads": 1, "qk_norm": True},
    "partial interleaved rope, parallel": dict(
        positions="rope", rotary_dim=4, rope_interleaved=True, parallel="shared", head_bias=True
    ),
    "post-norm": dict(norm_placement="post"),
    "softcaps": dict(attn_softcap=2.0, logit_softcap=3.0),
}


def model_of(**options: Any) -> GPT:
    """Return a model in fp64, so the last bit of a sum decides no token; biases and norms are random too."""
    shape: dict[str, Any] = dict(n_layers=2, n_heads=4, width=32, vocab_size=50, vocab_multiple=32, block_size=16)
    model, g = GPT(ModelConfig(**{**shape, **options})).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3 + ("norm" in name))
    return model


def model_that_says(ids: list[int], vocab_size: int) -> GPT:
    """Return a model whose most likely token at position p, whatever came before, is ids[p]."""
    config = ModelConfig(
        n_layers=1, n_heads=1, width=len(ids), vocab_size=vocab_size, vocab_multiple=1, block_size=len(ids), tied=False
    )
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        assert model.wpe is not None and model.norm_f is not None
        model.wpe.weight.copy_(torch.eye(len(ids)))
        model.norm_f.weight.fill_(1.0)
        model.head.weight[torch.tensor(ids), torch.arange(len(ids))] = 1.0
    return model


@functools.cache
def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with a token for each byte, without merges."""
    return train_tokenizer(["a"], 257)


def run_of(model: GPT, path: str) -> str:
    """Write a model with the tokenizer of bytes as a run; return its path."""
    state: dict[str, Any] = {"progress": {"step": 1, "tokens": 1}, "config": {}, "loader": {}}
    state |= {"tokenizer": byte_tokenizer().fingerprint, "model": dataclasses.asdict(model.config)}
    state |= {"source": {"name": "test", "revision": None}}
    checkpoint.save(Path(path), 1, model.state_dict(), {}, state, 0)
    byte_tokenizer().save(Path(path) / "tokenizer.json")
    return path
