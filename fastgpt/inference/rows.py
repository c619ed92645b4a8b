"""The state of a batch on the device, and the two passes over it: read prompts, and generate a token for each row."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastgpt.inference.adapters import Selection
from fastgpt.inference.graphs import DecodeGraphs
from fastgpt.inference.requests import Request
from fastgpt.inference.sampling import Choice, Options, Settings, choose
from fastgpt.inference.scoring import Scores, score
from fastgpt.inference.tables import Tables
from fastgpt.models.cache import KVCache
from fastgpt.models.gpt import GPT

PREFILL_TOKENS = 4096  # in one pass


class Rows:
    """Cache, last tokens and settings of up to `count` texts of up to `size` tokens; the first rows are in use.

    All tensors are allocated here. `decode` has the same shapes in every step and reads no host numbers but `options`,
    so on a GPU it runs from a CUDA graph (graphs.py), one for each number of rows and Options, unless `graphs` is
    false. With adapters it is one for each Selection, too; the graphs of an earlier Selection are dropped.
    """

    def __init__(self, model: GPT, count: int, size: int, graphs: bool = True) -> None:
        self.model, self.count, self.size = model, count, size
        activations: Tensor = model.get_parameter("blocks.0.norm1.weight")  # other weights may be narrower than they
        self.device = activations.device
        self.cache = KVCache(model.config, count, size, activations.detach())
        self.lens = torch.zeros(count, dtype=torch.int64, device=self.device)  # tokens in the cache
        self.tokens = torch.zeros(count, dtype=torch.int64, device=self.device)  # the last ones, not in the cache yet
        self.settings = Settings.of_rows(count, self.device)
        self.u = torch.zeros(count, dtype=torch.float64, device=self.device)
        self.tables = Tables(count, model.vocab_size, self.device)
        self.adapters = torch.zeros(count, dtype=torch.int64, device=self.device)  # numbers; 0: none
        self.selection: Selection | None = None  # the last one
        self.graphs = DecodeGraphs(model, self.lens, graphs)

    def set(self, row: int, request: Request, ids: Sequence[int], adapter: int = 0) -> None:
        """Set up a row for a request whose text is ids.

        Args:
            adapter: number of its adapter, 0 for none.
        """
        self.adapters[row] = adapter
        values = (request.temperature, request.top_k or self.model.vocab_size, request.top_p, request.min_p)
        penalties = (request.repetition_penalty, request.presence_penalty, request.frequency_penalty)
        for t, value in zip(self.settings, (*values, *penalties), strict=True):
            t[row] = value
        self.tables.set(row, request, ids)

    def move(self, source: int, to: int, length: int) -> None:
        """Copy a row of `length` tokens over another."""
        self.cache.move(source, to, length)
        for t in (self.lens, self.tokens, self.adapters, *self.settings):
            t[to] = t[source]
        self.tables.move(source, to)

    def prefill(
        self,
        first: int,
        texts: Sequence[Sequence[int]],
        options: Options,
        u: Sequence[float],
        scored: Sequence[int | None] = (),
        selection: Selection | None = None,
    ) -> tuple[Choice, list[Scores | None]]:
        """Read texts into the rows from `first` on, padded on the right to the longest, and choose the next tokens.

        No token sees the padding, because attention is causal; later tokens overwrite it in the cache. A pass reads
        PREFILL_TOKENS at most, so the memory for activations does not grow with the texts. Dynamic rotary scaling
        depends on the length of a text, which is then read in one pass.

        Args:
            scored: for each text how many of the most likely tokens the scores of its tokens list; None: no scores.

        Returns:
            The choice, and for each of `scored` the scores of the text's tokens but the first, or None.
        """
        last, longest = first + len(texts), max(map(len, texts))
        ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts]).to(self.device)
        ends = [len(text) for text in texts]
        scores = [None if n is None else Scores([], []) for n in scored]
        dynamic = (self.model.config.rope_scaling or {}).get("rope_type") == "dynamic"
        size = longest if dynamic else max(1, PREFILL_TOKENS // len(texts))
        part, final = self.cache.part(first, last), self.cache.k.new_empty(len(texts), self.model.config.width)
        for start in range(0, longest, size):
            with self._adapted(selection, first, last):
                h = self.model.hidden(ids[:, start : start + size], kv_cache=part)
            for row, end in enumerate(ends):
                if start < end <= start + size:
                    final[row] = h[row, end - 1 - start]
            for row, (n, into) in enumerate(zip(scored, scores, strict=True)):
                count = min(ends[row] - 1 - start, h.shape[1])  # of tokens with a next one
                if n is not None and into is not None and count > 0:
                    score(self.model, h[row, :count], ids[row, start + 1 : start + 1 + count], n, into)
        self.lens[first:last] = torch.tensor(ends).to(self.device)
        self.draw(first, u)
        return self._choose(final, first, last, options), scores

    def draw(self, first: int, u: Sequence[float]) -> None:
        """Set the random numbers of the rows from `first` on."""
        if u:
            self.u[first : first + len(u)] = torch.tensor(u, dtype=torch.float64)

    def decode(self, count: int, options: Options, selection: Selection | None = None) -> Choice:
        """Read the last tokens of the first `count` rows, and choose the next ones; valid until the next step.

        Args:
            selection: as in `prefill`.
        """
        if selection is not None and selection is not self.selection:
            self.graphs.drop(self.selection)
            self.selection = selection
        return self.graphs((count, options, selection), lambda: self._decode(count, options, selection))

    def _decode(self, count: int, options: Options, selection: Selection | None) -> Choice:
        with self._adapted(selection, 0, count):
            h = self.model.hidden(self.tokens[:count, None], kv_cache=self.cache.part(0, count, self.lens[:count]))
        self.lens[:count] += 1
        return self._choose(h[:, 0], 0, count, options)

    def _adapted(self, selection: Selection | None, first: int, last: int) -> Any:
        """Return a context in which the model has the adapters of these rows."""
        return nullcontext() if selection is None else selection.on(self.adapters[first:last, None])

    def _choose(self, h: Tensor, first: int, last: int, options: Options) -> Choice:
        settings, tables = self.settings.rows(first, last), self.tables.rows(first, last)
        choice = choose(self.model.logits(h), settings, options, self.u[first:last], tables)
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
