"""Texts as token ids for `Engine.loglikelihoods`, cut where the evaluation harness cuts them."""

from __future__ import annotations

from collections.abc import Sequence

from fastgpt.core.errors import UserError
from fastgpt.evaluate.engine import Engine
from fastgpt.evaluate.results import Results
from fastgpt.evaluate.target import Target

Text = tuple[str, str]  # a context and its continuation


def pair_of(engine: Engine, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the ids of a context and of its continuation.

    They are encoded together; blanks at the end of the context belong to the continuation. An empty context is the
    start token.
    """
    tokenizer = engine.target.tokenizer
    if not context:
        return [engine.start], [int(i) for i in tokenizer.encode(continuation)]
    whole, n = tokenizer.prompt(context + continuation), len(tokenizer.prompt(context.rstrip()))
    return whole[:n], whole[n:]


def require_fit(target: Target, task: str, texts: Sequence[Text]) -> None:
    """Raise UserError if a continuation is longer than the context of the model."""
    for _, continuation in texts:
        n, most = len(target.tokenizer.encode(continuation)), target.model.block_size
        if n > most:
            raise UserError(
                f"{task}: {continuation!r:.60} has {n} tokens, expected at most the model's context, {most}"
            )


def log_probs(engine: Engine, results: Results, task: str, texts: Sequence[Text]) -> list[float]:
    """Return the log-probability (nats) of each continuation after its context; count the contexts that were cut."""
    scored = engine.loglikelihoods([pair_of(engine, *text) for text in texts])
    if cut := sum(s.truncated > 0 for s in scored):
        results.truncated[task] = results.truncated.get(task, 0) + cut
    return [s.logprob for s in scored]
