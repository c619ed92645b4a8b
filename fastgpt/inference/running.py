"""A request on its way through the generator."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from torch import Tensor

from fastgpt.inference.adapters import Adapter
from fastgpt.inference.matcher import Matcher
from fastgpt.inference.pages import Chain
from fastgpt.inference.requests import FinishReason, Request, Result
from fastgpt.inference.scoring import Scores
from fastgpt.inference.stream import TextStream


def context_start(length: int, context: int) -> int:
    """Return the first token that the model reads of a text of `length` tokens."""
    half = max(1, context // 2)
    return 0 if length <= context else -(-(length - context) // half) * half


@dataclass(eq=False)
class Running:
    """A request and what came of it so far."""

    number: int
    request: Request
    ids: list[int]  # of the prompt and the new text
    prompt_tokens: int
    seed: int
    stream: TextStream
    matcher: Matcher | None = None  # of its grammar
    adapter: Adapter | None = None
    start: int = 0  # the first token that the model reads
    read: int = 0  # tokens from there on in the cache
    chain: Chain = field(default_factory=Chain)  # pages of the cache
    placed: int = 0  # pages that the row's table on the device has
    cached_tokens: int = 0
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    scores: Scores | None = None  # of the prompt

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    @property
    def adapter_number(self) -> int:
        """Number of the adapter, 0 for none."""
        return 0 if self.adapter is None else self.adapter.number

    @property
    def allowed(self) -> Tensor | None:
        """The tokens that may come next, as Tables.allowed has them; None: all."""
        return None if self.matcher is None else self.matcher.allowed

    @property
    def tree(self) -> str:
        """The pages of which texts are the same as those of this one: keys and values depend on the adapter. Its name
        may be given to another one later, its number is not."""
        return f"adapter {self.adapter_number}"

    @property
    def wanted(self) -> int:
        """Tokens of the text at its longest."""
        return self.prompt_tokens + self.request.max_new_tokens

    @property
    def text(self) -> list[int]:
        """The tokens that the model reads."""
        return self.ids[self.start :] if self.start else self.ids

    @property
    def unscored(self) -> bool:
        """The scores of the prompt are wanted, so it has to be read."""
        return self.request.prompt_logprobs is not None and len(self.ids) == self.prompt_tokens

    def begin(self, context: int) -> None:
        """Begin to read the text, without pages."""
        self.start, self.read, self.placed, self.chain = context_start(len(self.ids), context), 0, 0, Chain(self.tree)
        if self.unscored:
            self.scores = Scores([], [])

    def result(self, reason: FinishReason) -> Result:
        asked = self.request.logprobs is not None
        return Result(
            self.ids[self.prompt_tokens :],
            self.stream.text,
            reason,
            self.prompt_tokens,
            self.seed,
            self.logprobs if asked else None,
            self.top_logprobs if asked else None,
            None if self.scores is None else [None, *self.scores.logprobs],
            None if self.scores is None else [[], *self.scores.top],
            self.cached_tokens,
        )
