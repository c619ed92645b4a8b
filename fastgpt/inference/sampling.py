"""Choose the next tokens of a batch, each row with settings of its own.

    z = logits + bias
    of tokens already in the text: z / penalty if z > 0, z penalty else             (Keskar 2019, arXiv:1909.05858)
    z = z - frequency n - presence [n > 0], n times a token was added               (as OpenAI's API defines them)
    z = -inf where a grammar forbids the token                                      (grammar.py)
    z = z / temperature
    keep z >= the top_k-th largest                                                  (Fan 2018, arXiv:1805.04833)
    keep the most likely tokens, until their probabilities sum to top_p             (Holtzman 2019, arXiv:1904.09751)
    keep p >= min_p max p                                                           (Nguyen 2024, arXiv:2407.01082)
    token = the first whose cumulated probability, in the order of ids, exceeds u;  temperature 0: the most likely

The order and the definitions are those of transformers. Tokens as likely as the last one kept are kept, too, so the
result does not depend on the order in which equal numbers are sorted. u is a number from 0 to 1 that the caller draws
for each row, so a row's tokens do not depend on the other rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgpt.inference.tables import Tables, unpack

FEW = 1024  # logits that top_p sorts first


class Options(NamedTuple):
    """What any row of a batch needs. These are host numbers, fixed in a recorded graph."""

    sampled: bool = False  # a row with a temperature above 0
    penalised: bool = False  # a row with a repetition penalty
    top_k: int = 0  # the largest; 0: no row has one
    top_p: bool = False
    every_top_k: bool = False  # all sampled rows with top_p have a top_k, so no row needs all logits sorted
    min_p: bool = False
    logprobs: int | None = None  # most alternatives that a row returns; None: no row asks for log-probabilities
    counted: bool = False  # a row with a presence or frequency penalty
    biased: bool = False
    constrained: bool = False  # a row with a grammar


class Settings(NamedTuple):
    """Settings of the rows, on the model's device, each (B,)."""

    temperature: Tensor  # fp32; 0 is greedy
    top_k: Tensor  # int64; the vocabulary's size is off
    top_p: Tensor  # fp32; 1 is off
    min_p: Tensor  # fp32; 0 is off
    penalty: Tensor  # fp32; 1 is off
    presence: Tensor  # fp32; 0 is off
    frequency: Tensor  # fp32; 0 is off

    @classmethod
    def of_rows(cls, rows: int, device: torch.device) -> Settings:
        """Allocate settings for greedy rows."""
        zeros, ones = torch.zeros(rows, device=device), torch.ones(rows, device=device)
        whole = torch.ones(rows, dtype=torch.int64, device=device)
        return cls(zeros, whole, ones, zeros.clone(), ones.clone(), zeros.clone(), zeros.clone())

    def rows(self, first: int, last: int) -> Settings:
        """Return the settings of rows first to last - 1, as views."""
        return Settings(*(t[first:last] for t in self))


class Choice(NamedTuple):
    """The chosen tokens of B rows, and log-probabilities if asked for."""

    token: Tensor  # (B,) int64; -1 where the logits are not finite
    logprob: Tensor | None = None  # (B,) of the token, by the model: before penalty, temperature and filters
    top_logprobs: Tensor | None = None  # (B, n), the most likely tokens, largest first
    top_ids: Tensor | None = None  # (B, n) int64


def penalise(z: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Apply penalty (B,) to the logits z (B, V) of the tokens `seen` (B, V) bool: divide positive ones, multiply
    negative ones."""
    factor = penalty[:, None]
    return torch.where(seen, torch.where(z < 0, z * factor, z / factor), z)


def largest(z: Tensor, s: Settings, o: Options, waits: bool) -> Tensor:
    """Return the largest logits of each row of z (B, V) in order, (B, n), at least as many as top_k and top_p keep."""
    size = z.shape[-1]
    if not o.top_p or o.every_top_k:
        return z.topk(min(o.top_k, size)).values
    if not waits:
        return z.topk(size).values
    if o.top_k <= FEW < size:
        few = z.topk(FEW).values
        mass = (few.logsumexp(-1) - z.logsumexp(-1)).exp()
        enough = (mass > s.top_p + 1e-4) | (s.top_p >= 1) | (s.top_k <= FEW)  # far above rounding
        if bool(enough.all()):
            return few
    return torch.from_numpy(np.sort(z.numpy(), axis=-1)).flip(-1)  # three times as fast as PyTorch's


def keep_likely(z: Tensor, s: Settings, o: Options, waits: bool = False) -> Tensor:
    """Set the logits z (B, V), already divided by the temperature, to -inf where a filter removes the token; `waits` as
    in `choose`."""
    size = z.shape[-1]
    if o.top_k or o.top_p:
        ordered = largest(z, s, o, waits)
        ranks = torch.arange(ordered.shape[1], device=z.device)
        kept = ranks < s.top_k[:, None]
        if o.top_p:
            masked = ordered.masked_fill(~kept, -torch.inf)
            total = torch.where(s.top_k >= size, z.logsumexp(-1), masked.logsumexp(-1))  # `ordered` may not have all
            p = (masked - total[:, None]).exp()
            before = p.cumsum(-1) - p
            # the first one whatever happens: a tiny top_p is 0 in fp32
            kept = kept & ((before < s.top_p[:, None]) | (s.top_p[:, None] >= 1) | (ranks == 0))
        lowest = ordered.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
        whole = (s.top_k >= size) & (s.top_p >= 1)  # a row without these filters; `ordered` may not hold all its logits
        z = z.masked_fill((z < lowest) & ~whole[:, None], -torch.inf)
    if o.min_p:
        z = z.masked_fill(z < z.amax(-1, keepdim=True) + s.min_p.log()[:, None], -torch.inf)
    return z


def draw(z: Tensor, u: Tensor) -> Tensor:
    """Draw a token (B,) from softmax(z), z (B, V), with one number 0 <= u < 1 (B,) fp64 for each row."""
    total = z.softmax(-1).cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(total, u[:, None] * total[:, -1:], right=True)[:, 0]


def adjust(z: Tensor, s: Settings, o: Options, tables: Tables) -> Tensor:
    """Apply bias, penalties and grammars to the logits z (B, V)."""
    if o.biased and tables.bias is not None:
        z = z + tables.bias
    if o.penalised and tables.seen is not None:
        z = penalise(z, tables.seen, s.penalty)
    if o.counted and (n := tables.counts) is not None:
        z = z - (s.frequency[:, None] * n + s.presence[:, None] * (n > 0))
    if o.constrained and tables.allowed is not None:
        z = z.masked_fill(~unpack(tables.allowed, z.shape[-1]), -torch.inf)
    return z


def choose(
    logits: Tensor, s: Settings, o: Options, u: Tensor, tables: Tables | None = None, waits: bool = False
) -> Choice:
    """Choose a token for each row of logits (B, V).

    Args:
        s, o: the settings of the rows, and what any of them needs.
        u: (B,) fp64, 0 <= u < 1; not read for rows with temperature 0.
        tables: of the rows; those are read that the options name.
        waits: the logits are on a CPU and no graph is recorded. Then top_p sorts a few of them, if these are enough.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wanted = z
    if tables is not None:
        z = adjust(z, s, o, tables)
    best = z.max(-1)
    token = best.indices
    if o.sampled:
        cold = s.temperature == 0
        # a smaller temperature overflows; subtracting the maximum first keeps the largest at 0
        warm = (z - best.values[:, None]) / s.temperature.clamp(min=1e-30).to(z.dtype)[:, None]
        token = torch.where(cold, token, draw(keep_likely(warm, s, o, waits), u))
    token = torch.where(best.values.isfinite(), token, -1)
    if o.logprobs is None:
        return Choice(token)
    logprobs = wanted.log_softmax(-1)
    top = logprobs.topk(min(o.logprobs, logprobs.shape[-1]))
    return Choice(token, logprobs.gather(1, token.clamp(min=0)[:, None])[:, 0], top.values, top.indices)
