"""The cache and the rows of a batch on the device; the two passes: read texts, and generate a token for each row."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.inference.adapters import Selection
from fastgpt.inference.graphs import DecodeGraphs
from fastgpt.inference.requests import Request
from fastgpt.inference.sampling import Choice, Options, Settings, choose
from fastgpt.inference.scoring import Scores, score
from fastgpt.inference.tables import Tables
from fastgpt.models.gpt import GPT
from fastgpt.models.paged import PagedCache, Reading, Span, Stepping


class Part(NamedTuple):
    """A part of a text that a pass reads.

    Attributes:
        ids: of the part, and, with `into`, the token after them if the text has one.
        span: where it is in the text, and the text's pages.
        adapter: number of the text's adapter, 0 for none.
        scored, into: add the scores of the tokens after each of the part to `into`, with the `scored` most likely ones.
    """

    ids: Sequence[int]
    span: Span
    adapter: int = 0
    scored: int = 0
    into: Scores | None = None


class Rows:
    """Cache of `pages` pages, and pages, last tokens and settings of up to `count` texts of up to `size` tokens, which
    are generated; the first rows are in use.

    All tensors are allocated here. `decode` has the same shapes in every step and reads no host numbers but `options`,
    so on a GPU it runs from a CUDA graph (graphs.py), one for each number of rows and Options, unless `graphs` is
    false. With adapters it is one for each Selection, too; the graphs of an earlier Selection are dropped.
    """

    def __init__(
        self,
        model: GPT,
        count: int,
        size: int,
        pages: int,
        page_size: int,
        graphs: bool = True,
    ) -> None:
        self.model, self.count = model, count
        most = -(-size // page_size)
        self.size = most * page_size
        activations: Tensor = model.get_parameter("blocks.0.norm1.weight")  # other weights may be narrower than they
        self.device = activations.device
        self.cache = PagedCache(model.config, pages, page_size, activations.detach())
        self.pages = torch.zeros(count, most, dtype=torch.int32, device=self.device)
        self.lens = torch.zeros(count, dtype=torch.int64, device=self.device)  # tokens in the cache
        self.tokens = torch.zeros(count, dtype=torch.int64, device=self.device)  # the last ones, not in the cache yet
        self.settings = Settings.of_rows(count, self.device)
        self.u = torch.zeros(count, dtype=torch.float64, device=self.device)
        self.tables = Tables(count, model.vocab_size, self.device)
        self.adapters = torch.zeros(count, dtype=torch.int64, device=self.device)  # numbers; 0: none
        self.selection: Selection | None = None  # the last one
        self.graphs = DecodeGraphs(model, self.lens, graphs)

    def set(
        self, row: int, request: Request, ids: Sequence[int], new: Sequence[int] = (), read: int = 0, adapter: int = 0
    ) -> None:
        """Set up a row for a request whose text is ids.

        Args:
            new: the tokens of ids that were added to the prompt.
            read: tokens in the cache.
            adapter: number of its adapter, 0 for none.
        """
        values = (request.temperature, request.top_k or self.model.vocab_size, request.top_p, request.min_p)
        penalties = (request.repetition_penalty, request.presence_penalty, request.frequency_penalty)
        for t, value in zip(self.settings, (*values, *penalties), strict=True):
            t[row] = value
        self.lens[row], self.adapters[row] = read, adapter
        self.tables.set(row, request, ids, new)

    def place(self, places: Sequence[tuple[int, int, int]]) -> None:
        """Set pages of rows: (row, place in the text, page)."""
        row, place, page = torch.tensor(places).to(self.device).unbind(1)
        self.pages.index_put_((row, place), page.int())

    def move(self, source: int, to: int) -> None:
        """Copy a row over another. The cache stays as it is."""
        for t in (self.pages, self.lens, self.tokens, self.adapters, *self.settings):
            t[to] = t[source]
        self.tables.move(source, to)

    def read(self, parts: Sequence[Part], selection: Selection | None = None) -> Tensor:
        """Read parts of texts, packed into one row. Returns the input of the head at the last token of each part,
        (len(parts), C).

        Args:
            selection: layers with the adapters of the texts; None: they have none.
        """
        ids = torch.tensor([i for part in parts for i in part.ids[: part.span.tokens]]).to(self.device)
        cache = Reading(self.cache, [part.span for part in parts])
        with self._adapted(selection, parts):
            h = self.model.hidden(ids[None], kv_cache=cache)[0]
        ends = list(itertools.accumulate(part.span.tokens for part in parts))
        last = h[torch.tensor(ends).to(self.device) - 1]
        if len(parts) > 1 and not bool(last.isfinite().all()):
            # values that are not finite pass through masks to the other texts, because 0 * NaN is NaN
            return torch.cat([self.read([part], selection) for part in parts])
        for part, end in zip(parts, ends):
            start = end - part.span.tokens
            if part.into is not None and (targets := torch.tensor(part.ids[1:], device=self.device)).numel():
                score(self.model, h[start : start + len(targets)], targets, part.scored, part.into)
        return last

    def _adapted(self, selection: Selection | None, parts: Sequence[Part]) -> Any:
        """Return a context in which each token of a row of parts has its adapter."""
        if selection is None:
            return nullcontext()
        index = torch.tensor([part.adapter for part in parts for _ in range(part.span.tokens)])
        return selection.on(index[None].to(self.device))

    def draw(self, first: int, u: Sequence[float]) -> None:
        """Set the random numbers of the rows from `first` on."""
        if u:
            self.u[first : first + len(u)] = torch.tensor(u, dtype=torch.float64)

    def decode(self, count: int, options: Options, selection: Selection | None = None) -> Choice:
        """Read the last tokens of the first `count` rows, and choose the next ones; valid until the next step.

        Args:
            selection: as in `read`.
        """
        if selection is not None and selection is not self.selection:
            self.graphs.drop(self.selection)
            self.selection = selection
        return self.graphs((count, options, selection), lambda: self._decode(count, options, selection))

    def _decode(self, count: int, options: Options, selection: Selection | None) -> Choice:
        cache = Stepping(self.cache, self.pages[:count], self.lens[:count])
        with nullcontext() if selection is None else selection.on(self.adapters[:count, None]):
            h = self.model.hidden(self.tokens[:count, None], kv_cache=cache)
        self.lens[:count] += 1
        return self.choose(h[:, 0], 0, count, options)

    def choose(self, h: Tensor, first: int, last: int, options: Options) -> Choice:
        """Choose the next tokens of rows `first` to `last` - 1 from h (last - first, C), the input of the head."""
        settings, tables = self.settings.rows(first, last), self.tables.rows(first, last)
        waits = self.device.type == "cpu" and not self.graphs.enabled
        choice = choose(self.model.logits(h), settings, options, self.u[first:last], tables, waits)
        self.tokens[first:last] = choice.token
        tables.add(choice.token)
        return choice


def options_of(requests: Sequence[Request]) -> Options:
    """Return what any of the requests needs."""
    drawn = [r for r in requests if r.temperature > 0]
    filtered = [r for r in drawn if r.top_p < 1]
    alternatives = [r.logprobs for r in requests if r.logprobs is not None]
    return Options(
        sampled=bool(drawn),
        penalised=any(r.repetition_penalty != 1 for r in requests),
        top_k=max((r.top_k or 0 for r in drawn), default=0),
        top_p=bool(filtered),
        every_top_k=all(r.top_k is not None for r in filtered),
        min_p=any(r.min_p > 0 for r in drawn),
        logprobs=max(alternatives, default=None),
        counted=any(r.counts_tokens for r in requests),
        biased=any(r.logit_bias for r in requests),
        constrained=any(r.grammar is not None for r in requests),
    )
