"""The engine against a plain forward pass for each request."""

from __future__ import annotations

from pathlib import Path

import torch

from fastgpt.data.tokenizer import train_tokenizer
from fastgpt.evaluate.engine import Engine
from fastgpt.evaluate.target import Target
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT


def target(**settings: object) -> Target:
    """Return a tiny random model in fp64."""
    tokenizer = train_tokenizer(["the cat sat on the mat, and the dog saw it. "] * 4, 300)
    shape = dict(n_layers=2, n_heads=4, width=32, vocab_size=tokenizer.n_vocab, block_size=32, init_std=0.3)
    model = GPT(ModelConfig(**(shape | settings)), generator=torch.Generator().manual_seed(0)).double().eval()  # type: ignore[arg-type]
    return Target(model, tokenizer, "tiny", Path(), {})


def plain(model: GPT, context: list[int], continuation: list[int], size: int) -> tuple[float, bool]:
    """Score a pair with one forward pass of its own."""
    ids = torch.tensor([[*context, *continuation][-size - 1 :]])
    with torch.no_grad():
        z = model(ids[:, :-1])[0, -len(continuation) :].log_softmax(-1)
    wanted = torch.tensor(continuation)
    return float(z.gather(1, wanted[:, None]).sum()), bool((z.argmax(-1) == wanted).all())


def pairs(vocabulary: int) -> list[tuple[list[int], list[int]]]:
    """Return requests: some share a context, some begin alike, some exceed the context."""
    generator = torch.Generator().manual_seed(1)

    def draw(n: int) -> list[int]:
        return torch.randint(vocabulary, (n,), generator=generator).tolist()

    shots, question = draw(12), draw(6)
    found = [(shots + question, draw(n)) for n in (1, 1, 1, 5, 3)]
    found += [(shots + draw(3), draw(2)) for _ in range(3)] + [(draw(40), draw(4)), (draw(1), draw(32))]
    return [*found, found[0], (draw(1), draw(1))]


def test_scores_are_those_of_a_forward_pass_for_each_request() -> None:
    t = target()
    given = pairs(t.model.vocab_size)
    for scored, (context, continuation) in zip(Engine(t, batch_tokens=64).loglikelihoods(given), given):
        logprob, greedy = plain(t.model, context, continuation, 32)
        assert abs(scored.logprob - logprob) < 1e-9 and scored.greedy == greedy
        assert scored.truncated == max(0, len(context) + len(continuation) - 33)
