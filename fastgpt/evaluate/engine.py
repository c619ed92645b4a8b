"""Log-probabilities of continuations under a model, for many requests at once.

A request is a context and a continuation, both token ids. What does not fit is cut from the left of the context, as the
LM Evaluation Harness does. What requests begin with in common is computed once (prefixes.py), and a pass of the model
computes as many parts as fit into `batch_tokens`, without padding (fastgpt/models/tree.py). Only positions whose next
token is asked for go through the LM head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastgpt.core.errors import UserError
from fastgpt.evaluate.prefixes import Ids, Node, depth_first, trees_of
from fastgpt.evaluate.target import Target
from fastgpt.inference import Generator, Request, Result
from fastgpt.models.cache import KVCache
from fastgpt.models.gpt import GPT
from fastgpt.models.tree import Segment, TokenTree

Numbers = npt.NDArray[Any]
Pair = tuple[Sequence[int], Sequence[int]]  # ids of a context and of its continuation

LOGITS = 1 << 24  # computed at a time, 64 MB in fp32
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


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
        batch_tokens: tokens in one pass of the model, at least the length of a text; default 16384 on a GPU and 2048 on
            a CPU. The results do not depend on it, up to rounding.
        context: tokens that the model reads at most; default its block_size. More is possible unless positions are
            learned.

    Attributes:
        counted: "passes" and "tokens" that the model computed for log-likelihoods, and "rows" of its LM head.

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
        self.batch_tokens = batch_tokens or BATCH_TOKENS[self.device.type]
        self.counted: Counter[str] = Counter()

    @torch.no_grad()
    def loglikelihoods(self, pairs: Sequence[Pair], progress: Callable[[int], object] | None = None) -> list[Scored]:
        """Score the continuation of each pair, in the order of the pairs.

        Args:
            pairs: ids of a context, which is not empty, and of its continuation, of 1 to `context` tokens.
            progress: called with the number of pairs that were scored since its last call.

        Raises:
            ValueError: a context or a continuation is empty or too long, or an id is outside the vocabulary.
            UserError: a log-probability is not finite.
        """
        work = Work(self, [self._fit(i, *pair) for i, pair in enumerate(pairs)], progress)
        work.run(work.trees)
        if not np.isfinite(work.logprobs).all():
            dtype = str(self.model.wte.weight.dtype).removeprefix("torch.")
            raise UserError(
                f"{self.target.name} has log-probabilities in {dtype} that are not finite, expected numbers"
            )
        cut = [max(0, len(a) + len(b) - 1 - self.context) for a, b in pairs]
        found = zip(work.logprobs.tolist(), work.greedy.tolist(), cut)
        return [Scored(*values) for values in found]

    def _fit(self, number: int, context: Sequence[int], continuation: Sequence[int]) -> tuple[Ids, int]:
        """Return the ids of a pair, without those that do not fit, and the length of the continuation."""
        if not context or not 0 < len(continuation) <= self.context:
            raise ValueError(
                f"pair {number} has {len(context)} and {len(continuation)} tokens, "
                f"expected a context and a continuation of 1 to {self.context}"
            )
        ids = np.array([*context, *continuation][-self.context - 1 :], np.int32)
        if ids.min() < 0 or ids.max() >= self.model.vocab_size:
            raise ValueError(f"pair {number} has ids outside the vocabulary, expected 0 to {self.model.vocab_size - 1}")
        return ids, len(continuation)

    def rolling(self, texts: Sequence[str | Sequence[int]]) -> list[tuple[float, int]]:
        """Return for each text the sum of the log-probabilities of its tokens, in nats, and their number.

        Args:
            texts: texts, or their ids without a start token.

        Each token is scored once, the first ones after a start token: the tokenizer's, or else its end-of-text token.
        A text that is longer than the context is scored in windows, as the harness does: each begins with the token
        before it, and the last one with as many as fit.
        """
        windows: list[Pair] = []
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


def rolling_windows(ids: list[int], start: int, context: int) -> list[Pair]:
    """Return the windows of a text as pairs of a context and a continuation; each of ids is in one continuation."""
    windows: list[Pair] = [([start], ids[:context])] if ids else []
    for first in range(context, len(ids), context):
        last = min(first + context, len(ids))
        windows.append((ids[max(0, last - context - 1) : first], ids[first:last]))
    return windows


def shared_limit(model: GPT) -> int | None:
    """Return the longest text whose keys are those of any text that begins like it, and that each of its tokens sees
    whole; None: any. Windows limit it, and rotary frequencies that depend on the length of the text."""
    c = model.config
    limits = [c.window_of(i) for i in range(c.n_layers)]
    if (c.rope_scaling or {}).get("rope_type") == "dynamic":
        limits.append(c.rope_scaling["original_max_position_embeddings"])  # type: ignore[index]
    return min((limit for limit in limits if limit is not None), default=None)


class Work:
    """Requests on their way through the model.

    Args:
        texts: ids of context and continuation, and the length of the latter.
        progress: called with the number of requests that are finished since its last call.

    Attributes:
        logprobs: of each request so far, fp64. greedy: whether its tokens so far are the most likely ones.
        trees: all that is to be computed.
    """

    def __init__(self, engine: Engine, texts: list[tuple[Ids, int]], progress: Callable[[int], object] | None) -> None:
        self.engine, self.model, self.texts, self.progress = engine, engine.model, texts, progress
        self.logprobs, self.greedy = np.zeros(len(texts)), np.ones(len(texts), bool)
        self.limit = shared_limit(engine.model)
        self.dynamic = (self.model.config.rope_scaling or {}).get("rope_type") == "dynamic"
        self.trees = trees_of([ids[:-1] for ids, _ in texts], self.limit)
        self.asked: dict[Node, list[tuple[int, int, int]]] = {}  # request, first and last + 1 position
        self.cache: KVCache | None = None  # of the parts above those in the pass
        for node in depth_first(self.trees)[0]:
            for i in node.texts:
                self._ask(i, node)

    def _ask(self, request: int, node: Node | None) -> None:
        """Note at which positions of which parts the tokens of a request's continuation are predicted."""
        ids, n = self.texts[request]
        first, last = len(ids) - 1 - n, len(ids) - 1
        while node is not None and node.end > first:
            if node.start < last:
                span = (request, max(first, node.start), min(last, node.end))
                self.asked.setdefault(node, []).append(span)
            node = node.parent

    def run(self, nodes: Sequence[Node]) -> None:
        """Compute trees whose roots follow what is in the cache, as many at a time as fit into a pass."""
        batch: list[Node] = []
        size = 0
        for node in nodes:
            large = node.tokens > self.engine.batch_tokens and bool(node.children)
            alone = large or (self.dynamic and self.limit is not None and node.end > self.limit)
            if batch and (alone or size + node.tokens > self.engine.batch_tokens):
                self._pass(batch)
                batch, size = [], 0
            if large:
                self._descend(node)
            elif alone:
                self._pass([node])
            else:
                batch.append(node)
                size += node.tokens
        if batch:
            self._pass(batch)

    def _descend(self, node: Node) -> None:
        """Compute a part, keep its keys and values, and compute what follows it."""
        if self.cache is None:
            like = self.model.get_parameter("blocks.0.norm1.weight")
            self.cache = KVCache(self.model.config, 1, self.engine.context, like.detach())
        ids = self._tensor(node.ids[node.start : node.end])
        self._score(self.model.hidden(ids[None], kv_cache=self.cache)[0], [node])
        self.run(node.children)
        self.cache.length = node.start

    def _pass(self, roots: Sequence[Node]) -> None:
        nodes, parents = depth_first(roots)
        ids = np.concatenate([node.ids[node.start : node.end] for node in nodes])
        segments = [Segment(node.end - node.start, parent) for node, parent in zip(nodes, parents)]
        tree = TokenTree(segments, self.cache, self.engine.device)
        self._score(self.model.hidden(self._tensor(ids)[None], tree=tree)[0], nodes)

    def _tensor(self, numbers: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(numbers.astype(np.int64)).to(self.engine.device)

    def _score(self, h: Tensor, nodes: Sequence[Node]) -> None:
        """Add what is asked for at the positions of parts to the requests. h: (T, C), the parts one after the other."""
        rows: list[Numbers] = []
        targets: list[Numbers] = []
        requests: list[Numbers] = []
        at = finished = 0
        for node in nodes:
            for request, first, last in self.asked.pop(node, ()):
                rows.append(np.arange(first, last) + at - node.start)
                targets.append(self.texts[request][0][first + 1 : last + 1])
                requests.append(np.full(last - first, request))
            at += node.end - node.start
            finished += len(node.texts)
        counted = self.engine.counted
        counted["passes"] += 1
        counted["tokens"] += at
        if rows:
            self._predict(h, *(np.concatenate(x) for x in (rows, targets, requests)))
        if self.progress is not None:
            self.progress(finished)

    def _predict(self, h: Tensor, rows: Numbers, targets: Numbers, requests: Numbers) -> None:
        """Add the log-probability of each target after the token of its row to its request."""
        order = np.argsort(rows, kind="stable")
        rows, targets, requests = rows[order], targets[order], requests[order]
        unique, inverse = np.unique(rows, return_inverse=True)
        self.engine.counted["rows"] += len(unique)
        size = max(1, LOGITS // self.model.vocab_size)
        for first in range(0, len(unique), size):
            here = slice(*np.searchsorted(inverse, (first, first + size)))
            part = h[self._tensor(unique[first : first + size])]
            place, target = self._tensor(inverse[here] - first), self._tensor(targets[here])
            z = self.model.logits(part)
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            logprobs = z[place, target] - z.logsumexp(-1)[place]
            np.add.at(self.logprobs, requests[here], logprobs.double().cpu().numpy())
            likely = (z.argmax(-1)[place] == target).cpu().numpy()
            np.logical_and.at(self.greedy, requests[here], likely)
