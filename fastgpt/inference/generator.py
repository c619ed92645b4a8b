"""Generate from a model for many requests at once.

A step is one pass of the model. It reads prompts, or it reads the last token of every text that is generated and adds
one to it. The two take turns, and a pass reads `prefill_tokens` of prompts at most, so a long prompt delays other texts
by a bounded time. The rows in use are always the first ones: if a request is finished, the last row moves to its place,
so no pass computes what nobody asked for.

Keys and values are in pages (pages.py). A text takes the pages of an earlier one that begins alike, and reads the rest.
If there are too few pages, the youngest request gives its own back, waits, and is read again later.

If a text is longer than the context, its first tokens are dropped, half a context at a time, and the rest is read anew.
So the model reads the same tokens with and without a cache.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from fastgpt.inference.adapters import Adapters, Selection
from fastgpt.inference.grammar import Grammar
from fastgpt.inference.matcher import Grammars, Matcher
from fastgpt.inference.requests import FinishReason, Piece, Request, Result, TextTokenizer, bytes_of
from fastgpt.inference.rows import Part, options_of
from fastgpt.inference.running import Running, context_start
from fastgpt.inference.sampling import Choice
from fastgpt.inference.schedule import PAGE_SIZE, PAGE_SIZES, PREFILL_TOKENS, Limits, Schedule
from fastgpt.inference.stream import TextStream
from fastgpt.inference.weights import convert_weights
from fastgpt.models.gpt import GPT
from fastgpt.models.paged import Span


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
            finetune` with adapters. `self.adapters` loads and unloads others between steps; with `weights`, these are
            only held against their base if `adapters` is given, if only as {}.
        graphs: on a GPU, run the steps after the first few from CUDA graphs, which hold memory for one step.
        prefill_tokens: tokens of prompts that are read between two steps of the texts that are generated; default and
            most 4096. A prompt is read in passes of 4096 if there is nothing else to do.
        cache_tokens: tokens of all texts in the cache; default max_batch texts of the whole context.
        page_size: tokens of a page, a power of two from 8 to 256.
        reuse: take the pages of earlier texts that begin alike.

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
        prefill_tokens: int | None = None,
        cache_tokens: int | None = None,
        page_size: int = PAGE_SIZE,
        reuse: bool = True,
    ) -> None:
        numbers = dict(max_batch=max_batch, context=context, prefill_tokens=prefill_tokens)
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise ValueError(f"Generator: {name} is {value}, expected at least 1")
        if page_size not in PAGE_SIZES:
            raise ValueError(f"Generator: page_size is {page_size}, expected a power of two from 8 to 256")
        dynamic = (model.config.rope_scaling or {}).get("rope_type") == "dynamic"
        if dynamic:  # the keys of a text depend on its length
            max_batch, reuse = 1, False
        self.adapters = Adapters(model)
        if weights is not None:
            if adapters is not None:
                self.adapters.base()
            convert_weights(model, weights)
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        self.context = model.block_size if context is None else context
        model.extend(self.context)
        if cache_tokens is not None and cache_tokens < self.context:
            raise ValueError(
                f"Generator: cache_tokens is {cache_tokens}, expected at least the context, {self.context}"
            )
        prefill_tokens = min(prefill_tokens or PREFILL_TOKENS, PREFILL_TOKENS)
        limits = (max_batch, self.context, prefill_tokens, cache_tokens, page_size, reuse, dynamic, graphs)
        self.schedule = Schedule(model, Limits(*limits))
        eos = tokenizer.ends if eos is None and tokenizer is not None else eos
        self.eos = frozenset(() if eos is None else (eos,) if isinstance(eos, int) else eos)
        self._read_last = self._kept = False
        self._grammars: Grammars | None = None
        self._added = 0
        for name, path in (adapters or {}).items():
            self.adapters.load(name, path)

    def reserve(self) -> None:
        """Allocate the cache for max_batch texts of the whole context, so that no request waits for memory. From then
        on, texts stay in it from call to call, so the weights must not change."""
        self._kept = True
        self.schedule.allocate(self.max_batch, self.context)

    @property
    def busy(self) -> bool:
        """There are requests that are not finished."""
        return self.schedule.busy

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
        self.schedule.waiting.append(Running(number, request, ids, len(ids), seed, stream, matcher, adapter=adapter))
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
        self.schedule.cancel(number)

    @torch.no_grad()
    def step(self) -> list[Piece]:
        """Run one pass of the model; return what it added, empty if there is nothing to do. The model must be in eval
        mode."""
        pieces, schedule = self._end_idle(), self.schedule
        schedule.admit()
        self._read_last = bool(schedule.reading) and not (self._read_last and schedule.running)
        return pieces + (self._read() if self._read_last else self._decode())

    def stream(self, requests: Sequence[Request]) -> Iterator[Piece]:
        """Generate; yield the pieces of all requests as they come, numbered from 0. Leaving the loop cancels the rest.

        Raises:
            ValueError: as `add`; requests of `add` are not finished; or a request ended with an error (Piece.error).
        """
        if self.busy:
            raise ValueError("Generator: other requests are running, expected none (many callers share add and step)")
        if not self._kept:
            self.schedule.pages.forget()  # the model may have been trained since then
        was_training = self.model.training
        self.model.eval()
        numbers: dict[int, int] = {}
        try:
            for i, request in enumerate(requests):
                numbers[self.add(request)] = i
            while self.busy:
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
            ValueError: as `stream`.
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
            ValueError: as `stream`; a text is longer than the context.
        """
        results = self.generate([Request(text, 0, prompt_logprobs=0) for text in texts])
        return [[p for p in result.prompt_logprobs or () if p is not None] for result in results]

    def _end_idle(self) -> list[Piece]:
        """End the requests that ask for nothing."""
        idle = [r for r in self.schedule.waiting if not r.request.max_new_tokens and r.request.prompt_logprobs is None]
        for r in idle:
            self.schedule.waiting.remove(r)
        return [Piece(r.number, None, "", r.result("length")) for r in idle]

    def _read(self) -> list[Piece]:
        """Read prompts, and add a token to each of those that are read completely."""
        schedule = self.schedule
        plan, rows, first = schedule.plan(), schedule.rows, len(schedule.running)
        if not plan or rows is None:
            return []
        h = rows.read([self._part(r, count) for r, count in plan], self._selection([r for r, _ in plan]))
        done = []
        for i, (r, count) in enumerate(plan):
            schedule.keep(r, count)
            if r.read == len(r.text):
                schedule.start(r)
                done.append(i)
        if not done:
            return []
        group = schedule.running[first:]
        options = options_of([r.request for r in group])
        rows.tables.allow(first, [r.allowed for r in group])
        rows.draw(first, [r.random.random() for r in group] if options.sampled else [])
        return self._take(rows.choose(h[done], first, first + len(group), options), first)

    def _part(self, r: Running, count: int) -> Part:
        span, end = Span(count, r.read, r.chain.pages), r.read + count
        if r.unscored and r.request.prompt_logprobs is not None:
            return Part(r.text[r.read : end + 1], span, r.adapter_number, r.request.prompt_logprobs, r.scores)
        return Part(r.text[r.read : end], span, r.adapter_number)

    def _decode(self) -> list[Piece]:
        """Read the last token of each row, and add one to it."""
        schedule = self.schedule
        if not schedule.place():
            return []
        rows, running, options = schedule.rows, schedule.running, schedule.options
        assert rows is not None
        rows.tables.allow(0, [r.allowed for r in running])
        rows.draw(0, [r.random.random() for r in running] if options.sampled else [])
        choice = rows.decode(len(running), options, self._selection(running))
        for r in running:
            schedule.keep(r, 1)
        return self._take(choice, 0)

    def _selection(self, group: Sequence[Running]) -> Selection | None:
        """Return layers with the adapters of some requests, None if they have none."""
        return self.adapters.select({r.adapter for r in group if r.adapter is not None})

    def _take(self, choice: Choice, first: int) -> list[Piece]:
        """Append the chosen tokens to the rows from `first` on. The finished ones leave, and those that are too long
        for the context are read anew."""
        tokens = choice.token.tolist()
        group = self.schedule.running[first:]
        if choice.logprob is not None and choice.top_logprobs is not None and choice.top_ids is not None:
            tops = zip(choice.logprob.tolist(), choice.top_ids.tolist(), choice.top_logprobs.tolist())
            for r, (logprob, ids, values) in zip(group, tops):
                if (n := r.request.logprobs) is not None:
                    r.logprobs.append(logprob)
                    r.top_logprobs.append(list(zip(ids[:n], values[:n])))
        pieces = [self._append(r, token) for r, token in zip(group, tokens)]
        ended = [piece.result is not None or piece.error is not None for piece in pieces]
        anew = [r.start != context_start(len(r.ids), self.context) for r in group]
        self.schedule.remove([first + i for i in range(len(group)) if ended[i] or anew[i]])
        for r, end, again in zip(group, ended, anew):
            if again and not end:
                self.schedule.reread(r)
        return pieces

    def _append(self, r: Running, token: int) -> Piece:
        if token < 0:
            self.schedule.pages.discard(r.chain)
            error = f"the logits after {len(r.ids)} tokens are not finite, expected finite numbers"
            return Piece(r.number, None, "", error=error)
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
