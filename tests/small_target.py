"""A random model with a tokenizer, opened for evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastgpt.data import Tokenizer, train_tokenizer
from fastgpt.evaluate.target import Target
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT


def small_tokenizer() -> Tokenizer:
    from benchmark_files import WORDS

    return train_tokenizer([" ".join(WORDS) * 3], 320)


def small_target(folder: Path, block_size: int = 512, **about: Any) -> Target:
    """Return a model in fp32 with random biases and norms."""
    tokenizer = small_tokenizer()
    shape = dict(n_layers=1, n_heads=2, width=16, vocab_size=tokenizer.n_vocab, vocab_multiple=1)
    model, g = GPT(ModelConfig(**shape, block_size=block_size)), torch.Generator().manual_seed(0)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3 + ("norm" in name))
    known = {"name": "small", "folder": str(folder), "step": None, "tokens": None, "fingerprint": "0"}
    return Target(model.eval(), tokenizer, "small", folder, {**known, **about})
