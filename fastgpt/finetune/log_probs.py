"""Log-probabilities of the tokens and the sequences of a batch, without the logits of the whole batch in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.data import IGNORE
from fastgpt.data.batch import Batch
from fastgpt.models.gpt import GPT

CHUNK = 256  # rows of logits in memory at a time on a CPU; backward computes them again


def token_log_probs(model: GPT, batch: Batch, targets: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Return the log-probability of each target, (B, T) fp32; 0 where the target is -100.

    Args:
        targets: (B, T) int64, default those of the batch.
        temperature: divides the logits.
    """
    targets = batch.targets if targets is None else targets
    h = model.hidden(batch.ids, positions=batch.positions, doc_ids=batch.doc_ids)  # (B, T, C)
    rows, labels = h.view(-1, h.shape[-1]), targets.reshape(-1)  # (B*T, C), (B*T,)
    if labels.device.type != "cpu":  # on other devices the host would wait for the number of rows
        loss = model.head_loss(rows, labels, reduction="none", temperature=temperature)
        return -loss.view(targets.shape)
    kept = (labels != IGNORE).nonzero().squeeze(1)
    loss = model.head_loss(rows[kept], labels[kept], reduction="none", temperature=temperature, chunk=CHUNK)
    return -loss.new_zeros(labels.shape).index_copy(0, kept, loss).view(targets.shape)


def members(sequence: Tensor, targets: Tensor, n: int) -> Tensor:
    """Return which targets count for each of n sequences, (n, B*T) bool, from `sequence` (B, T), the sequence of each
    token, and `targets` (B, T)."""
    numbers = torch.arange(n, device=sequence.device)[:, None]
    return (sequence.reshape(1, -1) == numbers) & (targets.reshape(1, -1) != IGNORE)


def sums(values: Tensor, member: Tensor) -> Tensor:
    """Sum `values` (B, T) over the members of each sequence: (n,). The order of additions is the same in every run,
    which index_add does not promise on a GPU."""
    return torch.where(member, values.reshape(1, -1), 0.0).sum(1)
