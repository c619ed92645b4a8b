"""Log-probabilities of continuations under a model, for many requests at once.

A request is a context and a continuation, both token ids. What does not fit is cut from the left of the context, as the
LM Evaluation Harness does. Only positions whose next token is asked for go through the LM head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastgpt.core.errors import UserError
from fastgpt.evaluate.target import Target
from fastgpt.inference import Generator, Request, Result

Pair = tuple[Sequence[int], Sequence[int]]  # ids of a context and of its continuation

LOGITS = 1 << 24  # computed at a time, 64 MB in fp32


@dataclass(frozen=True)
class Scored:
    """What the model says of a continuation.

    Attributes:
        logprob: sum of the log-probabilities of its tokens, in nats.
        greedy: whether each of its tokens is the most likely one.
        truncated: tokens that were cut from the left of the context.
    """

    logprob: float
    greedy: bool
    truncated: int = 0


class Engine:
    """Scores and generates texts with a model.

    Args:
        target: the model.
        batch_tokens: tokens in one pass of the model; default 4096 on a GPU and 2048 on a CPU.
        context: tokens that the model reads at most; default its block_size. More is possible unless positions are
            learned.

    Raises:
        UserError: a number is below 1, or the model cannot read as many tokens.
    """

    def __init__(self, target: Target, *, batch_tokens: int | None = None, context: int | None = None) -> None:
        for name, value in (("batch_tokens", batch_tokens), ("context", context)):
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}, expected at least 1")
        self.target, self.model = target, target.model
        self.device = next(self.model.parameters()).device
        self.context = self.model.block_size if context is None else context
        try:
            self.model.extend(self.context)
        except ValueError as e:
            raise UserError(f"context: {e}") from None
        self.batch_tokens = batch_tokens or (4096 if self.device.type == "cuda" else 2048)

    @torch.no_grad()
    def loglikelihoods(self, pairs: Sequence[Pair], progress: Callable[[int], object] | None = None) -> list[Scored]:
        """Score the continuation of each pair, in the order of the pairs.

        Args:
            pairs: ids of a context, which is not empty, and of its continuation, of 1 to `context` tokens.
            progress: called with the number of pairs that were scored since its last call.

        Raises:
            ValueError: a context or a continuation is empty or too long, or an id is outside the vocabulary.
        """
        texts = [self._fit(i, *pair) for i, pair in enumerate(pairs)]
        results: list[Scored] = [Scored(0.0, True)] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: -len(texts[i][0]))
        while order:
            n = max(1, self.batch_tokens // len(texts[order[0]][0]))
            batch, order = order[:n], order[n:]
            for i, scored in zip(batch, self._score([texts[i] for i in batch])):
                results[i] = scored
            if progress is not None:
                progress(len(batch))
        return results

    def _fit(self, number: int, context: Sequence[int], continuation: Sequence[int]) -> tuple[list[int], int, int]:
        """Return the ids that are read, with the continuation, the length of the latter, and the tokens cut."""
        ids = [*context, *continuation]
        if not context or not 0 < len(continuation) <= self.context:
            raise ValueError(
                f"pair {number} has {len(context)} and {len(continuation)} tokens, "
                f"expected a context and a continuation of 1 to {self.context}"
            )
        if min(ids) < 0 or max(ids) >= self.model.vocab_size:
            raise ValueError(
                f"pair {number} has an id outside the vocabulary, expected 0 to {self.model.vocab_size - 1}"
            )
        cut = max(0, len(ids) - 1 - self.context)
        return ids[cut:], len(continuation), cut

    def _score(self, texts: list[tuple[list[int], int, int]]) -> list[Scored]:
        longest = len(texts[0][0]) - 1
        rows = [[*ids[:-1], *[0] * (longest - len(ids) + 1)] for ids, _, _ in texts]
        h = self.model.hidden(torch.tensor(rows, device=self.device))
        scored = []
        for row, (ids, n, cut) in zip(h, texts):
            logprob, greedy = 0.0, True
            wanted = torch.tensor(ids[-n:], device=self.device)
            part = row[len(ids) - 1 - n : len(ids) - 1]
            size = max(1, LOGITS // self.model.vocab_size)
            for rows_, targets in zip(part.split(size), wanted.split(size)):
                z = self.model.logits(rows_)
                z = z.to(torch.promote_types(z.dtype, torch.float32)).log_softmax(-1)
                logprob += float(z.gather(1, targets[:, None]).sum())
                greedy = greedy and bool((z.argmax(-1) == targets).all())
            scored.append(Scored(logprob, greedy, cut))
        return scored

    def rolling(self, texts: Sequence[str | Sequence[int]]) -> list[tuple[float, int]]:
        """Return for each text the sum of the log-probabilities of its tokens, in nats, and their number.

        Args:
            texts: texts, or their ids without a start token.

        Each token is scored once, the first ones after a start token: the tokenizer's, or else its end-of-text token.
        A text that is longer than the context is scored in windows, as the harness does: each begins with the token
        before it, and the last one with as many as fit.
        """
        windows: list[tuple[list[int], list[int]]] = []
        counts = []
        for text in texts:
            ids = self.target.tokenizer.encode(text).tolist() if isinstance(text, str) else list(text)
            found = rolling_windows(ids, self.start, self.context)
            counts.append((len(found), len(ids)))
            windows += found
        scored = iter(self.loglikelihoods(windows))
        return [(float(sum(next(scored).logprob for _ in range(n))), tokens) for n, tokens in counts]

    @property
    def start(self) -> int:
        """The start token: the last one that the tokenizer puts before a prompt, its BOS token, or its end of text."""
        tokenizer = self.target.tokenizer
        return tokenizer.prefix[-1] if tokenizer.prefix else tokenizer.specials.get(tokenizer.bos, tokenizer.eot)

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """Continue prompts; results in the order of the requests."""
        lengths = [len(request.prompt) + request.max_new_tokens for request in requests]
        order = sorted(range(len(requests)), key=lambda i: -lengths[i])  # texts of similar length run together
        generator = Generator(self.model, self.target.tokenizer, context=self.context)
        results = generator.generate([requests[i] for i in order])
        places = {i: place for place, i in enumerate(order)}
        return [results[places[i]] for i in range(len(requests))]


def rolling_windows(ids: list[int], start: int, context: int) -> list[tuple[list[int], list[int]]]:
    """Return the windows of a text as pairs of a context and a continuation; each of ids is in one continuation."""
    windows = [([start], ids[:context])] if ids else []
    for first in range(context, len(ids), context):
        last = min(first + context, len(ids))
        windows.append((ids[max(0, last - context - 1) : first], ids[first:last]))
    return windows
