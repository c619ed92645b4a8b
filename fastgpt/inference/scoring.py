"""Log-probabilities of tokens that are given, in memory that does not grow with their number."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt.models.gpt import GPT

LOGITS = 1 << 24  # computed at a time, 64 MB in fp32

Top = list[tuple[int, float]]  # the most likely tokens, (id, log-probability), largest first


class Scores(NamedTuple):
    """Log-probabilities of tokens by the model, and for each of them the most likely tokens."""

    logprobs: list[float]
    top: list[Top]


@torch.no_grad()
def score(model: GPT, h: Tensor, targets: Tensor, n: int, into: Scores) -> None:
    """Append the scores of targets (N,) int64 to `into`, with the n most likely tokens of each.

    h: (N, C), the output of model.hidden at the tokens before.
    """
    rows = max(1, LOGITS // model.vocab_size)
    for part, wanted in zip(h.split(rows), targets.split(rows), strict=True):
        z = model.logits(part)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        total = z.logsumexp(-1, keepdim=True)
        into.logprobs.extend((z.gather(1, wanted[:, None]) - total)[:, 0].tolist())
        best = z.topk(min(n, z.shape[-1]))
        for ids, values in zip(best.indices.tolist(), (best.values - total).tolist()):
            into.top.append(list(zip(ids, values)))
