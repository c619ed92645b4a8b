"""Distillation: a student learns a teacher's distribution over the next token, and the next token itself.

    loss = a CE + (1 - a) t^2 D(teacher, student)      per token that counts; D at temperature t

D is the forward KL, the reverse KL or the generalised JSD of fastgpt/ops/linear_divergence.py, which never has whole
logits of either model in memory. t^2 keeps the size of the gradient as t grows (Hinton et al. 2015, arXiv:1503.02531).
With a = 0 and t = 1 the loss is that of TRL's GKDTrainer on the same tokens (Agarwal et al. 2024, arXiv:2306.13649).

Instead of a teacher, a task can have a cache of the teacher's k most likely tokens at each position
(fastgpt/finetune/teacher_cache.py). The rest of the vocabulary is then one bucket, so D is the divergence over k + 1
outcomes: at most the divergence over all, and equal to it at k = V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgpt import ops
from fastgpt.core.errors import UserError
from fastgpt.data import IGNORE
from fastgpt.data.batch import Batch
from fastgpt.finetune.teacher import Teacher, head_of
from fastgpt.finetune.teacher_cache import TeacherCache
from fastgpt.models.gpt import GPT
from fastgpt.ops.divergence import divergence_ref

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
ROWS = 128  # of logits at a time, with a cache


@dataclass
class Distil:
    """The task. Figures: the mean cross-entropy (unless `ce` is 0) and the mean divergence, not weighted.

    Attributes:
        teacher: a model, or the cache of one.
        ce: a, the share of the cross-entropy, 0 to 1 (1 would leave out the teacher and is refused).
        kind: the divergence.
        beta: share of the teacher in the mixture of "jsd".
        temperature: t.

    Raises:
        UserError: a value out of its range, a setting without effect, or a cache at another temperature.
    """

    teacher: Teacher | TeacherCache
    ce: float = 0.5
    kind: Divergence = "forward_kl"
    beta: float | None = None
    temperature: float = 1.0
    unit: ClassVar[str] = "token"

    def __post_init__(self) -> None:
        if not 0 <= self.ce < 1:
            raise UserError(f"ce is {self.ce:g}, expected at least 0 and less than 1")
        if self.kind not in get_args(Divergence):
            raise UserError(f"kind is {self.kind!r}, expected one of {', '.join(get_args(Divergence))}")
        if self.beta is not None and self.kind != "jsd":
            raise UserError(f"beta has no effect with kind {self.kind}")
        if self.beta is not None and not 0 < self.beta < 1:
            raise UserError(f"beta is {self.beta:g}, expected a number between 0 and 1")
        if not self.temperature > 0:
            raise UserError(f"temperature is {self.temperature:g}, expected a number above 0")
        if isinstance(self.teacher, TeacherCache) and self.teacher.temperature != self.temperature:
            made = f"the teacher's cache was made at temperature {self.teacher.temperature:g}"
            raise UserError(f"{made}, expected {self.temperature:g}")

    @property
    def figures(self) -> tuple[str, ...]:
        return ("cross_entropy", "divergence") if self.ce else ("divergence",)

    def prepare(self, model: GPT) -> None:
        """Refuse a student whose vocabulary is not the teacher's, or whose head cannot be distilled to.

        Raises:
            UserError: what does not fit.
        """
        head_of(model, "student")
        cached = isinstance(self.teacher, TeacherCache)
        known = self.teacher.vocab_size if isinstance(self.teacher, TeacherCache) else self.teacher.weight.shape[0]
        if known < model.vocab_size or (cached and known != model.vocab_size):
            raise UserError(
                f"the teacher has {known} tokens, expected the student's {model.vocab_size}: "
                "both need the same tokenizer"
            )

    def counted(self, batch: Batch) -> Tensor:
        """Return the tokens of a batch that count, () int64."""
        return (batch.targets != IGNORE).sum()

    def loss(self, model: GPT, batch: Batch) -> Tensor:
        """Return the sums over the tokens of the loss and the figures, (2,) or (3,) fp32."""
        h = model.hidden(batch.ids, positions=batch.positions, doc_ids=batch.doc_ids)
        rows, targets = h.view(-1, h.shape[-1]), batch.targets.reshape(-1)  # (N, C), (N,)
        if isinstance(self.teacher, TeacherCache):
            divergence = self._from_cache(model, rows, batch)
        else:
            weight, bias = head_of(model, "student")
            divergence = ops.linear_divergence(
                rows, weight, self.teacher.hidden(batch), self.teacher.weight, targets, linear_bias=bias,
                teacher_bias=self.teacher.bias, kind=self.kind, beta=0.5 if self.beta is None else self.beta,
                temperature=self.temperature, vocab_size=model.vocab_size, ignore_index=IGNORE, reduction="sum",
            )  # fmt: skip
        total = (1 - self.ce) * self.temperature**2 * divergence
        if not self.ce:
            return torch.stack([total, divergence.detach()])
        ce = model.head_loss(rows, targets, reduction="sum")
        return torch.stack([self.ce * ce + total, ce.detach(), divergence.detach()])

    def _from_cache(self, model: GPT, rows: Tensor, batch: Batch) -> Tensor:
        """Return the sum of the divergences over the cached outcomes and the rest, ROWS rows of logits at a time; the
        backward recomputes these."""
        assert isinstance(self.teacher, TeacherCache)
        ids, logp = self.teacher.find(batch)  # (N, k), (N, k)
        on = batch.targets.reshape(-1) != IGNORE
        total = rows.new_zeros((), dtype=torch.promote_types(rows.dtype, torch.float32))
        for start in range(0, len(rows), ROWS):
            part = slice(start, start + ROWS)
            total = total + checkpoint(
                self._some, model, rows[part], ids[part], logp[part], on[part], use_reentrant=False
            )
        return total

    def _some(self, model: GPT, rows: Tensor, ids: Tensor, logp: Tensor, on: Tensor) -> Tensor:
        z = model.logits(rows)
        logq = (z.to(torch.promote_types(z.dtype, torch.float32)) / self.temperature).log_softmax(-1)
        q = with_rest(logq, ids)
        p = torch.where(
            on[:, None], logp[:, : q.shape[1]].to(q.dtype), q.detach()
        )  # a row that does not count has divergence 0
        beta = 0.5 if self.beta is None else self.beta
        return torch.where(on, divergence_ref(q, p, self.kind, beta, 1.0), 0.0).sum()


def with_rest(logq: Tensor, ids: Tensor) -> Tensor:
    """Return the log-probabilities of the tokens `ids` (n, k), then that of all others together, if there are others:
    (n, k + 1)."""
    top = logq.gather(1, ids)
    if ids.shape[1] == logq.shape[1]:
        return top
    return torch.cat([top, logq.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)], 1)
