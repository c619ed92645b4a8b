"""Single-digit sums for tests of reinforcement learning: a tokenizer of characters, prompts, and a reward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fastgpt.finetune.rollouts import Prompt
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT

TEXT = "0123456789+=."


class Characters:
    """A tokenizer with an id for each character of TEXT; '.' ends a text."""

    eot, n_vocab = len(TEXT) - 1, len(TEXT)
    prefix: tuple[int, ...] = ()
    ends = (len(TEXT) - 1,)

    def encode(self, text: str) -> list[int]:
        return [TEXT.index(c) for c in text]

    prompt = encode

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(TEXT[i] for i in ids).encode()


def prompts(most: int = 4) -> list[Prompt]:
    """Return all sums of two numbers up to `most`, with the answer as a column."""
    texts = {f"{a}+{b}=": str(a + b) for a in range(most + 1) for b in range(most + 1)}
    return [Prompt(tuple(Characters().encode(text)), text, {"answer": answer}) for text, answer in texts.items()]


def right(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """Return 1 for a right answer, else 0."""
    return [float(text == expected) for text, expected in zip(completions, answer)]


def make(seed: int = 0) -> GPT:
    """Return a small model for these sums."""
    shape: dict[str, Any] = dict(n_layers=1, n_heads=4, width=64, vocab_size=len(TEXT), vocab_multiple=1, block_size=8)
    return GPT(ModelConfig(**shape, init_std=0.1), generator=torch.Generator().manual_seed(seed))


def teach(model: GPT, data: list[Prompt], seed: int, steps: int = 150, share: float = 0.5) -> None:
    """Train on sums of which `share` have the right answer and the rest a random digit."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.tensor([prompt.ids for prompt in data])
    answers = torch.tensor([int(prompt.columns["answer"]) for prompt in data])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0)
    for step in range(steps):
        correct = torch.rand(len(data), generator=g) < share
        targets = torch.full_like(ids, -100)
        targets[:, -1] = torch.where(correct, answers, torch.randint(10, answers.shape, generator=g))
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        optimizer.zero_grad()
        model(ids, targets).backward()
        optimizer.step()
