"""An engine that says what a test wants, with a tokenizer of bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from small_models import byte_tokenizer

from fastgpt.evaluate.engine import Scored
from fastgpt.evaluate.results import Results
from fastgpt.inference import Request


class StandIn:
    """Scores a continuation with `score(context, continuation)`, and continues a prompt with `say(prompt)`."""

    def __init__(
        self, score: Callable[[str, str], float] = lambda context, text: 0.0, say: Callable[[str], str] = str
    ) -> None:
        self.score, self.say, self.tokenizer, self.context = score, say, byte_tokenizer(), 256
        self.start = self.tokenizer.eot
        self.target: Any = SimpleNamespace(
            tokenizer=self.tokenizer, chat=None, name="model", about={"fingerprint": "f" * 64}
        )
        self.asked: list[Request] = []

    def loglikelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
        decode = self.tokenizer.decode
        return [Scored(self.score(decode([i for i in a if i != self.start]), decode(b)), False) for a, b in pairs]

    def generate(self, requests: Sequence[Request]) -> list[Any]:
        self.asked += requests
        prompts = [r.prompt if isinstance(r.prompt, str) else self.tokenizer.decode(r.prompt) for r in requests]
        texts = [self.say(p) for p in prompts]
        return [SimpleNamespace(text=t, ids=[int(i) for i in self.tokenizer.encode(t)]) for t in texts]


def run(part: Any, engine: StandIn, limit: int | None = None) -> Results:
    """Return what a part finds."""
    results = Results({"name": "model"}, "safety")
    part.run(engine, results, limit)
    return results
