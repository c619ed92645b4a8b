"""Rows of the divergence between a student's and a teacher's distribution: loss, and its gradient over the logits.

With p the teacher's and q the student's softmax at temperature t, over the first K columns, m = beta p + (1 - beta) q:

    forward_kl   L = sum p (log p - log q)                     dL/dz = (q - p) / t
    reverse_kl   L = sum q (log q - log p)                     dL/dz = q (log q - log p - L) / t
    jsd          L = beta KL(p || m) + (1 - beta) KL(q || m)   dL/dz = (1 - beta) q (log q - log m - KL(q || m)) / t

0 log 0 is 0: a class that both mask with -inf adds nothing. A class that only the denominator masks makes a KL
infinite, as it is; jsd is always finite.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgpt.ops._common import define, no_outputs

KINDS = ("forward_kl", "reverse_kl", "jsd")  # the raw ops take the number
OPTIONS = "int kind, float beta, float temperature, int ignore_index, int vocab_size"
LINEAR_DIVERGENCE_ROWS = define(
    "linear_divergence",
    "linear_divergence_rows",
    f"(Tensor(a!) logits, Tensor(b!) loss, Tensor teacher, Tensor? target, Tensor scale, {OPTIONS}) -> ()",
    no_outputs,
)


def _log_mixture(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """Return log(beta p + (1 - beta) q); -inf where both are."""
    return torch.logaddexp(logp + math.log(beta), logq + math.log1p(-beta))


def _kl_terms(logp: Tensor, logq: Tensor) -> Tensor:
    """Return the terms p (log p - log q) of KL(p || q), 0 where p is 0."""
    p = logp.exp()
    return p * torch.where(p == 0, 0.0, logp - logq)


def divergence_ref(logits: Tensor, teacher_logits: Tensor, kind: str, beta: float, temperature: float) -> Tensor:
    """Compute the formulas at the head of this file from logits (N, K), as PyTorch differentiates them -> (N,)."""
    logq, logp = (logits / temperature).log_softmax(-1), (teacher_logits / temperature).log_softmax(-1)
    if kind == "forward_kl":
        return _kl_terms(logp, logq).sum(-1)
    if kind == "reverse_kl":
        return _kl_terms(logq, logp).sum(-1)
    logm = _log_mixture(logp, logq, beta)
    return beta * _kl_terms(logp, logm).sum(-1) + (1 - beta) * _kl_terms(logq, logm).sum(-1)


def _rows(z: Tensor, z_t: Tensor, kind: str, beta: float, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the loss (n,) and its gradient (n, K) of a few rows, in fp32 (fp64 for fp64 logits)."""
    wide = torch.promote_types(z.dtype, torch.float32)
    logq, logp = ((t.to(wide) / temperature).log_softmax(-1) for t in (z, z_t))
    q = logq.exp()
    if kind == "forward_kl":
        return _kl_terms(logp, logq).sum(-1), q.sub_(logp.exp()).div_(temperature)
    other = logp if kind == "reverse_kl" else _log_mixture(logp, logq, beta)
    gap = torch.where(q == 0, 0.0, logq - other)
    kl = (q * gap).sum(-1)
    grad = gap.sub_(kl[:, None]).mul_(q)
    if kind == "reverse_kl":
        return kl, grad.div_(temperature)
    loss = beta * _kl_terms(logp, other).sum(-1) + (1 - beta) * kl
    return loss, grad.mul_((1 - beta) / temperature)


def _rows_at_once(z: Tensor) -> int:
    """Return how many rows are computed at a time: temporary tensors of 1 MiB on a CPU, 64 MiB on a GPU."""
    return max(1, (1 << 18 if z.device.type == "cpu" else 1 << 24) // max(1, z.shape[1]))


def divergence_rows(
    logits: Tensor, loss: Tensor, teacher: Tensor, target: Tensor | None, scale: Tensor, kind: int, beta: float,
    temperature: float, ignore_index: int, vocab_size: int,
) -> None:  # fmt: skip
    """Write the loss (n,) of each row and overwrite the logits with scale (1,) or (n,) times its gradient, as
    LINEAR_DIVERGENCE_ROWS does.

    Rows whose target is ignore_index have loss and gradient 0, and so have the columns from vocab_size on.
    """
    k, step = vocab_size, _rows_at_once(logits)
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        some, grad = _rows(logits[rows, :k], teacher[rows, :k], KINDS[kind], beta, temperature)
        grad.mul_((scale if scale.numel() == 1 else scale[rows])[:, None])
        if target is not None:
            on = target[rows] != ignore_index
            some, grad = torch.where(on, some, 0.0), torch.where(on[:, None], grad, 0.0)
        loss[rows] = some
        logits[rows, :k] = grad
        logits[rows, k:] = 0.0
