"""Task heads in place of the LM head of fastgpt.models.gpt.GPT: classes, a number, a label per token, or a reward.

    head = HeadConfig("classification", labels=("no", "yes"), pad_id=0)
    attach(model, head)                                       model.head is now a TaskHead
    scores = sequence_scores(model, head, ids, sequence, count, doc_ids=doc_ids, positions=positions)

Sequences may be packed: `sequence` (B, T) int64 has the number of each token's sequence within the batch, -1 for
padding. A sequence is scored from the output of its last token that is not padding, as the classes of transformers do
it, or from the mean over its tokens.

Dims: B rows, T tokens, N = B*T, C width, L outputs, S sequences of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastgpt.core.errors import UserError
from fastgpt.models.block import make_module
from fastgpt.models.gpt import GPT
from fastgpt.nn import Linear

Kind = Literal["classification", "regression", "tags", "reward"]
Pooling = Literal["last", "mean"]


@dataclass(frozen=True)
class HeadConfig:
    """What a task head predicts; part of the state of a checkpoint.

    Attributes:
        kind: classification and tags have an output for each label, of a sequence or of each token; regression and
            reward have one output for a sequence.
        labels: names of the outputs of classification and tags, in their order.
        pooling: what stands for a sequence.
        pad_id: the token that pads. It never counts as the last token of a sequence, so a sequence that ends with an
            end-of-text token is scored at the token before it if that token also pads, here and in transformers.

    Raises:
        UserError: labels that are missing, too few, given twice, or have no use.
    """

    kind: Kind
    labels: tuple[str, ...] = ()
    pooling: Pooling = "last"
    pad_id: int | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("kind", self.kind, get_args(Kind)), ("pooling", self.pooling, get_args(Pooling))):
            if value not in known:
                raise UserError(f"head: {name} is {value!r}, expected one of {', '.join(known)}")
        if self.named and len(self.labels) < 2:
            raise UserError(f"head: {self.kind} has {len(self.labels)} labels, expected at least 2")
        if not self.named and self.labels:
            raise UserError(f"head: {self.kind} has labels {', '.join(self.labels)}, expected none")
        if twice := [label for label in self.labels if self.labels.count(label) > 1]:
            raise UserError(f"head: label {twice[0]!r} is given twice")
        if self.kind == "tags" and self.pooling != "last":
            raise UserError("head: pooling mean has no effect on tags, which every token has")

    @property
    def named(self) -> bool:
        """Whether the outputs have names."""
        return self.kind in ("classification", "tags")

    @property
    def outputs(self) -> int:
        return len(self.labels) if self.named else 1

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"labels": list(self.labels)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HeadConfig:
        """Return what `to_dict` described. Raises UserError as the constructor does."""
        return cls(**{**values, "labels": tuple(values["labels"])})


class TaskHead(Linear):
    """Outputs (..., L) of a task from (..., C), the output of GPT.hidden."""

    def forward(self, input: Tensor, tied: Tensor | None = None) -> Tensor:
        return super().forward(input)  # the token embedding, which a tied LM head is, has no part in it


@torch.no_grad()
def attach(model: GPT, head: HeadConfig, generator: torch.Generator | None = None) -> None:
    """Put a new task head in place of the model's head: normal weights as elsewhere in the model, bias 0 (tags only).

    An LM head that is not tied to the token embedding is lost. The model then returns (B, T, L) from `model(ids)`.
    """
    table = model.wte.weight
    with torch.device(table.device):
        new = make_module(TaskHead, model.config.width, head.outputs, bias=head.kind == "tags")
    new = new.to(table.dtype)
    if not new.weight.is_meta:
        std = model.config.init_std
        new.weight.copy_(torch.empty(new.weight.shape, device="cpu").normal_(0.0, std, generator=generator))
        if new.bias is not None:
            new.bias.zero_()
    model.head = new


def last_tokens(ids: Tensor, sequence: Tensor, count: int, pad_id: int | None) -> Tensor:
    """Return the place in the N tokens of the last token of each sequence that is not pad_id: (S,) int64, -1 for a
    number that no token has. Never waits for the device.

    Args:
        ids, sequence: (B, T) int64.
        count: S.
    """
    number = sequence.reshape(-1)  # (N,)
    counts = number >= 0
    if pad_id is not None:
        counts = counts & (ids.reshape(-1) != pad_id)
    number = torch.where(counts, number, count)  # what does not count goes into a slot of its own
    places = torch.arange(len(number), device=ids.device)
    last = torch.full((count + 1,), -1, dtype=torch.int64, device=ids.device)
    return last.scatter_reduce(0, number, places, "amax")[:count]


def pool_last(h: Tensor, last: Tensor) -> Tensor:
    """Return the output of each sequence's last token: (S, C) from h (B, T, C); a sequence without tokens has another
    one's."""
    return h.reshape(-1, h.shape[-1]).index_select(0, last.clamp(min=0))


def pool_mean(h: Tensor, sequence: Tensor, count: int) -> Tensor:
    """Return the mean output of each sequence's tokens: (S, C) from h (B, T, C); zeros for one without tokens."""
    numbers = torch.arange(count, device=h.device)
    share = sequence.reshape(1, -1) == numbers[:, None]  # (S, N): a product sums in one order, scattered adds do not
    total = share.sum(1, keepdim=True).clamp(min=1)
    return (share.to(h.dtype) @ h.reshape(-1, h.shape[-1])) / total.to(h.dtype)


def sequence_scores(
    model: GPT,
    head: HeadConfig,
    ids: Tensor,
    sequence: Tensor,
    count: int,
    *,
    doc_ids: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Score the sequences of a batch: (S, L) fp32.

    Args:
        ids, sequence: (B, T) int64; `sequence` from -1 to count - 1.
        count: S; a number that no token has gets a score without meaning.
        doc_ids, positions: as in GPT.forward.
    """
    h = model.hidden(ids, positions=positions, doc_ids=doc_ids)
    if head.pooling == "last":
        pooled = pool_last(h, last_tokens(ids, sequence, count, head.pad_id))
    else:
        pooled = pool_mean(h, sequence, count)
    scores: Tensor = model.head(pooled)
    return scores.float()


def token_scores(model: GPT, ids: Tensor, *, doc_ids: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
    """Score every token: (B, T, L) fp32 from ids (B, T)."""
    scores: Tensor = model.head(model.hidden(ids, positions=positions, doc_ids=doc_ids))
    return scores.float()
