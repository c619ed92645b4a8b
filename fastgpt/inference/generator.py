"""Generate from a model for many requests at once.

A step is one pass of the model and adds a token to every row of the batch: it reads the prompts of new requests, or, if
there are none, the last token of every row. The rows in use are always the first ones: if a request is finished, the
last row moves to its place, so no pass computes what nobody asked for.

If a text is longer than the context, its first tokens are dropped, half a context at a time, and the rest is read anew.
So the model reads the same tokens with and without a cache.
"""

from __future__ import annotations

import dataclasses
import random
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastgpt.inference.adapters import Adapter, Adapters, Selection
from fastgpt.inference.grammar import Grammar
from fastgpt.inference.matcher import Grammars, Matcher
from fastgpt.inference.requests import FinishReason, Piece, Request, Result, TextTokenizer, bytes_of
from fastgpt.inference.rows import PREFILL_TOKENS, Rows, options_of
from fastgpt.inference.sampling import Choice, Options
from fastgpt.inference.scoring import Scores
from fastgpt.inference.stream import TextStream
from fastgpt.inference.weights import convert_weights
from fastgpt.models.gpt import GPT


def context_start(length: int, context: int) -> int:
    """Return the first token that the model reads of a text of `length` tokens."""
    half = max(1, context // 2)
    return 0 if length <= context else -(-(length - context) // half) * half


@dataclass
class Running:
    """A request and what came of it so far."""

    number: int
    request: Request
    ids: list[int]  # of the prompt and the new text
    prompt_tokens: int
    seed: int
    stream: TextStream
    matcher: Matcher | None = None  # of its grammar
    start: int = -1  # the first token in the cache; -1: nothing was read yet
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    scores: Scores | None = None  # of the prompt
    adapter: Adapter | None = None

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    @property
    def wanted(self) -> int:
        """Tokens of the text at its longest."""
        return self.prompt_tokens + self.request.max_new_tokens

    @property
    def allowed(self) -> Tensor | None:
        """The tokens that may come next, as Tables.allowed has them; None: all."""
        return None if self.matcher is None else self.matcher.allowed

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
        )


class Generator:
    """Generator of texts from a model.

    Args:
        model: on any device, in any dtype; it is in eval mode while tokens are generated.
        tokenizer: for prompts that are texts, stop strings and the text of results; None: ids only.
        max_batch: rows of a batch; further requests wait. A model with dynamic rotary scaling has one row, because its
            frequencies depend on the length of the text.
        context: tokens of a text that the model reads at most; default its block_size. More is possible unless
            positions are learned; the rotary tables are extended.
        eos: id or ids that end a text; default those of the tokenizer.
        weights: "fp32", "bf16" or "int8" converts the model itself (`convert_weights`); None leaves it as it is.
        adapters: low-rank adapters by name, which requests choose: folders in PEFT's format, or runs of `fastgpt
            finetune` with adapters. `self.adapters` loads and unloads others between steps.
        graphs: on a GPU, run the steps after the first few from CUDA graphs, which hold memory for one step.

    The cache is allocated for the requests that wait when no request runs; `reserve` allocates the largest one.

    Raises:
        ValueError: names the argument, its value and what is expected.
        UserError: an adapter is damaged, or does not fit the model.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: TextTokenizer | None = None,
        *,
        max_batch: int = 16,
        context: int | None = None,
        eos: int | Sequence[int] | None = None,
        weights: str | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        graphs: bool = True,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("context", context)):
            if value is not None and value < 1:
                raise ValueError(f"Generator: {name} is {value}, expected at least 1")
        if (model.config.rope_scaling or {}).get("rope_type") == "dynamic":
            max_batch = 1
        if weights is not None:
            convert_weights(model, weights)
        self.model, self.tokenizer, self.max_batch, self.graphs = model, tokenizer, max_batch, graphs
        self.context = model.block_size if context is None else context
        model.extend(self.context)
        eos = tokenizer.ends if eos is None and tokenizer is not None else eos
        self.eos = frozenset(() if eos is None else (eos,) if isinstance(eos, int) else eos)
        self.waiting: list[Running] = []
        self.running: list[Running] = []  # in the order of the rows
        self._rows: Rows | None = None
        self._options: Options | None = None  # of the running requests
        self._grammars: Grammars | None = None
        self._added = 0
        self.adapters = Adapters(model)
        for name, path in (adapters or {}).items():
            self.adapters.load(name, path)

    def reserve(self) -> None:
        """Allocate the cache for max_batch texts of the whole context, so that no request waits for memory."""
        self._rows = Rows(self.model, self.max_batch, self.context, self.graphs)

    def add(self, request: Request) -> int:
        """Add a request; return its number.

        Raises:
            ValueError: the prompt is empty, has ids that the model lacks, or is longer than the context although its
                log-probabilities are asked for; a text needs a tokenizer; there is no such adapter; or the grammar
                cannot be compiled.
            UserError: a grammar needs llguidance, which is not installed.
        """
        if self.tokenizer is None and (isinstance(request.prompt, str) or request.stop or request.grammar):
            raise ValueError("Generator: a prompt, a stop string or a grammar is a text, expected a tokenizer")
        prompt = request.prompt
        ids = self.tokenizer.prompt(prompt) if isinstance(prompt, str) and self.tokenizer is not None else prompt
        ids = [int(i) for i in ids]
        if not ids:
            raise ValueError("Generator: the prompt is empty, expected at least one token")
        if not 0 <= min(ids) <= max(ids) < self.model.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self.model.vocab_size)
            raise ValueError(f"Generator: the prompt has id {wrong}, expected 0 to {self.model.vocab_size - 1}")
        if request.prompt_logprobs is not None and len(ids) > self.context:
            raise ValueError(f"Generator: the prompt has {len(ids)} tokens, expected at most {self.context}")
        adapter = None if request.adapter is None else self.adapters.find(request.adapter)
        if request.logit_bias and not 0 <= min(request.logit_bias) <= max(request.logit_bias) < self.model.vocab_size:
            raise ValueError(f"Generator: logit_bias has ids beyond 0 to {self.model.vocab_size - 1}, expected none")
        matcher = None if request.grammar is None else self._matcher(request.grammar, request.stop)
        seed = secrets.randbits(63) if request.seed is None else request.seed
        number = self._added
        self._added += 1
        stream = TextStream(request.stop)
        self.waiting.append(Running(number, request, ids, len(ids), seed, stream, matcher, adapter=adapter))
        return number

    def _matcher(self, grammar: Grammar, stop: Sequence[str]) -> Matcher:
        """Return what a grammar allows. A special token that is a stop string may end the text, too."""
        assert self.tokenizer is not None
        return self.load_grammars().start(
            grammar, [i for s in stop if (i := self.tokenizer.specials.get(s)) is not None]
        )

    def load_grammars(self) -> Grammars:
        """Read the tokenizer for grammars, which takes up to a second; otherwise the first request with one does so.

        Raises:
            ValueError: there is no tokenizer, or no end-of-text token.
            UserError: llguidance is not installed.
        """
        if self.tokenizer is None:
            raise ValueError("Generator: a grammar is about texts, expected a tokenizer")
        if self._grammars is None:
            self._grammars = Grammars(self.tokenizer, self.eos, self.model.vocab_size)
        return self._grammars

    def cancel(self, number: int) -> None:
        """Drop a request that waits or runs; one that is finished is ignored."""
        self.waiting = [r for r in self.waiting if r.number != number]
        self._remove([row for row, r in enumerate(self.running) if r.number == number])

    @torch.no_grad()
    def step(self) -> list[Piece]:
        """Run one pass of the model; return what it added, empty if there is nothing to do. The model must be in eval
        mode.

        Raises:
            ValueError: the logits of a row are not finite; all running requests are dropped.
        """
        pieces = self._admit()
        unread = [row for row, r in enumerate(self.running) if r.start != context_start(len(r.ids), self.context)]
        if unread:
            first, last = self._group(unread)
            return pieces + self._prefill(first, last)
        return pieces + self._decode() if self.running else pieces

    def stream(self, requests: Sequence[Request]) -> Iterator[Piece]:
        """Generate; yield the pieces of all requests as they come, numbered from 0. Leaving the loop cancels the rest.

        Raises:
            ValueError: as `add` and `step`; requests of `add` are not finished; or a grammar reached a limit.
        """
        if self.waiting or self.running:
            raise ValueError("Generator: other requests are running, expected none (many callers share add and step)")
        was_training = self.model.training
        self.model.eval()
        numbers: dict[int, int] = {}
        try:
            for i, request in enumerate(requests):
                numbers[self.add(request)] = i
            while self.waiting or self.running:
                for p in self.step():
                    if p.error is not None:
                        raise ValueError(f"Generator: {p.error}")
                    yield dataclasses.replace(p, number=numbers[p.number])
        finally:
            for number in numbers:
                self.cancel(number)
            self.model.train(was_training)

    def generate(self, requests: Sequence[Request], on_text: Callable[[int, str], None] | None = None) -> list[Result]:
        """Generate; return the results in the order of the requests.

        Args:
            requests: prompts with their settings.
            on_text: called with the position of a request in `requests` and each new piece of its text.

        Raises:
            ValueError: as `add` and `step`.
        """
        results: dict[int, Result] = {}
        for piece in self.stream(requests):
            if on_text is not None and piece.text:
                on_text(piece.number, piece.text)
            if piece.result is not None:
                results[piece.number] = piece.result
        return [results[i] for i in range(len(requests))]

    def score(self, texts: Sequence[str | Sequence[int]]) -> list[list[float]]:
        """Return the log-probability of each token of each text, given those before it; the first token has none.

        Args:
            texts: texts, which get the tokenizer's prefix, or ids.

        Raises:
            ValueError: as `add` and `step`; a text is longer than the context.
        """
        results = self.generate([Request(text, 0, prompt_logprobs=0) for text in texts])
        return [[p for p in result.prompt_logprobs or () if p is not None] for result in results]

    def _admit(self) -> list[Piece]:
        """Give rows to waiting requests, as long as they fit; return the results of requests for no tokens."""
        idle = [r for r in self.waiting if not r.request.max_new_tokens and r.request.prompt_logprobs is None]
        pieces = [Piece(r.number, None, "", r.result("length")) for r in idle]
        self.waiting = [r for r in self.waiting if r not in idle]
        if not self.waiting:
            return pieces
        if not self.running:
            count = min(self.max_batch, len(self.waiting))
            size = min(self.context, max(r.wanted for r in self.waiting))
            if self._rows is None or self._rows.count < count or self._rows.size < size:
                self._rows = None  # free the old one first
                self._rows = Rows(self.model, count, size, self.graphs)
        rows = self._rows
        assert rows is not None
        new: list[Running] = []
        while self.waiting and len(self.running) + len(new) < rows.count:
            if min(self.context, self.waiting[0].wanted) > rows.size:
                break  # it waits until a larger cache can be allocated
            new.append(self.waiting.pop(0))
        for r in sorted(new, key=lambda r: len(r.ids)):  # texts of similar length side by side need little padding
            rows.set(len(self.running), r.request, r.ids, 0 if r.adapter is None else r.adapter.number)
            self.running.append(r)
            self._options = None
        return pieces

    def _group(self, unread: list[int]) -> tuple[int, int]:
        """Return the first rows to read together: neighbours that need at most a quarter of padding."""
        first = last = unread[0]
        total = longest = 0
        for row in unread:
            text = self.running[row].ids
            n = len(text) - context_start(len(text), self.context)
            padded = max(longest, n) * (row - first + 1)
            if row != last or (row > first and (padded > 1.25 * (total + n) or padded > PREFILL_TOKENS)):
                break
            total, longest, last = total + n, max(longest, n), row + 1
        return first, last

    def _prefill(self, first: int, last: int) -> list[Piece]:
        group = self.running[first:last]
        scored = [r.request.prompt_logprobs if r.start < 0 else None for r in group]
        for r in group:
            r.start = context_start(len(r.ids), self.context)
        options = options_of([r.request for r in group])
        u = [r.random.random() for r in group] if options.sampled else []
        assert self._rows is not None
        texts, selection = [r.ids[r.start :] for r in group], self._selection(group)
        self._rows.tables.allow(first, [r.allowed for r in group])
        choice, scores = self._rows.prefill(first, texts, options, u, scored, selection)
        for r, found in zip(group, scores):
            r.scores = found or r.scores
        return self._take(choice, first, last)

    def _decode(self) -> list[Piece]:
        self._options = self._options or options_of([r.request for r in self.running])
        rows, count = self._rows, len(self.running)
        assert rows is not None
        rows.tables.allow(0, [r.allowed for r in self.running])
        rows.draw(0, [r.random.random() for r in self.running] if self._options.sampled else [])
        return self._take(rows.decode(count, self._options, self._selection(self.running)), 0, count)

    def _selection(self, group: Sequence[Running]) -> Selection | None:
        """Return layers with the adapters of some rows, None if they have none."""
        return self.adapters.select({r.adapter for r in group if r.adapter is not None})

    def _take(self, choice: Choice, first: int, last: int) -> list[Piece]:
        """Append the chosen tokens to the rows first to last - 1; the finished ones leave."""
        tokens = choice.token.tolist()
        if choice.logprob is not None and choice.top_logprobs is not None and choice.top_ids is not None:
            tops = zip(choice.logprob.tolist(), choice.top_ids.tolist(), choice.top_logprobs.tolist())
            for r, (logprob, ids, values) in zip(self.running[first:last], tops):
                if (n := r.request.logprobs) is not None:
                    r.logprobs.append(logprob)
                    r.top_logprobs.append(list(zip(ids[:n], values[:n])))
        if -1 in tokens:
            length = len(self.running[first + tokens.index(-1)].ids)
            self.running = []
            raise ValueError(f"Generator: the logits after {length} tokens are not finite, expected finite numbers")
        pieces = [self._append(r, token) for r, token in zip(self.running[first:last], tokens)]
        self._remove([first + i for i, piece in enumerate(pieces) if piece.result is not None or piece.error])
        return pieces

    def _append(self, r: Running, token: int) -> Piece:
        if not r.request.max_new_tokens:  # only the prompt was asked for
            return Piece(r.number, None, "", r.result("length"))
        r.ids.append(token)
        reason: FinishReason | None = None
        text = ""
        if token in self.eos and not r.request.ignore_eos:
            reason = "eos"
        elif self.tokenizer is not None:
            text = r.stream.push(bytes_of(self.tokenizer, token))
            reason = "stop" if r.stream.stopped else None
        if r.matcher is not None and reason is None:
            r.matcher.accept(token)
            if r.matcher.error:
                return Piece(r.number, token, text, error=r.matcher.error)
            reason = "stop" if r.matcher.complete else None
        if reason is None and len(r.ids) == r.wanted:
            reason = "length"
        newest = (r.logprobs[-1], r.top_logprobs[-1]) if r.request.logprobs is not None else (None, None)
        if reason is None:
            return Piece(r.number, token, text, None, *newest)
        text += r.stream.end()
        return Piece(r.number, token, text, r.result(reason), *newest)

    def _remove(self, gone: list[int]) -> None:
        """Remove rows; the last row moves to the place of each."""
        for row in sorted(gone, reverse=True):
            last = self.running.pop()
            if row < len(self.running):
                assert self._rows is not None
                self._rows.move(len(self.running), row, len(last.ids) - last.start if last.start >= 0 else 0)
                self.running[row] = last
            self._options = None
