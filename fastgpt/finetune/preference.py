"""Tasks that learn from preferences: DPO and IPO, KTO, ORPO.

With p the log-probability of a whole sequence (that of its learned tokens), r the same under the weights that the run
started with, and h = p - r:

    DPO   -log sigmoid(beta (h_chosen - h_rejected))
    IPO   (h_chosen - h_rejected - 1 / (2 beta))^2, or the same with h / tokens
    KTO   1 - sigmoid(beta (h - kl)) for a good example, 1 - sigmoid(beta (kl - h)) for a bad one
    ORPO  NLL of the chosen sequence - beta log sigmoid(log odds ratio of the two, from p / tokens)

Both sides of all pairs are documents of the same packed rows, so the model runs once. `Batch.extra` has

    sequence  (B, T) int64: the sequence of each token, -1 for padding. Pair i has the sequences 2 i (chosen) and
              2 i + 1 (rejected); with KTO, example i is sequence i
    index     (n,) int64: the row of each pair or example in the data set; -1 pads
    good      (n,) bool (KTO)
    kl_ids, kl_targets, kl_doc_ids, kl_positions, kl_sequence
              (KTO) a batch in which sequence i is the prompt of example i with the completion of another

Sources: Rafailov et al. (arXiv 2305.18290), Azar et al. (2310.12036), Chowdhury et al. (2403.00409, the loss "robust"),
Ethayarajh et al. (2402.01306), Hong et al. (2403.07691); the losses equal those of TRL 1.16.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.core.errors import UserError
from fastgpt.data import IGNORE
from fastgpt.data.batch import Batch
from fastgpt.finetune.log_probs import members, sums, token_log_probs
from fastgpt.models.gpt import GPT

DPOLoss = Literal["sigmoid", "robust", "ipo", "ipo-mean"]


def sequence_log_probs(model: GPT, batch: Batch, n: int) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each of n sequences, (n,) fp32, and its learned tokens, (n,) int64."""
    member = members(batch.extra["sequence"], batch.targets, n)
    return sums(token_log_probs(model, batch), member), member.sum(1)


def kl_batch(batch: Batch) -> Batch:
    """Return the batch of mismatched completions that a batch for KTO carries."""
    extra = batch.extra
    ids, targets, docs, positions = (extra[f"kl_{name}"] for name in ("ids", "targets", "doc_ids", "positions"))
    return Batch(ids, targets, docs, positions, {"sequence": extra["kl_sequence"], "index": extra["index"]})


def total(values: list[Tensor], batch: Batch) -> Tensor:
    """Sum each of `values` (n,), the loss and the figures, over the pairs or examples that are no padding:
    (1 + figures,)."""
    present = batch.extra["index"] >= 0
    rows = torch.stack([values[0], *(value.detach().to(values[0].dtype) for value in values[1:])])
    return torch.where(present, rows, 0.0).sum(1)


class Preference:
    """What tasks over whole sequences share."""

    unit: str  # no dataclass, in which these would be fields
    figures: tuple[str, ...]

    def loss(self, model: GPT, batch: Batch) -> Tensor:
        raise NotImplementedError

    def counted(self, batch: Batch) -> Tensor:
        """Return the pairs or examples of a batch, () int64."""
        return (batch.extra["index"] >= 0).sum()

    def prepare(self, model: GPT) -> None:
        """Refuse a model with dropout: it makes the log-probabilities of the same sequence differ."""
        c = model.config
        if rate := max(c.embed_dropout, c.attn_dropout, c.resid_dropout):
            raise UserError(f"dropout is {rate:g}, expected 0: preference losses compare log-probabilities")


@dataclass
class Referenced(Preference):
    """A task that compares with log-probabilities under the weights at the start.

    Attributes:
        beta: how strongly the model is held to the start weights
        reference: (rows, 2) fp32 on the model's device, from fastgpt/finetune/reference.py: those of each row's chosen
            and rejected sequence, or with KTO of its own and of the mismatched completion
    """

    beta: float = 0.1
    reference: Tensor | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"beta is {self.beta:g}, expected a number above 0")

    def referenced(self, batch: Batch) -> Tensor:
        """Return the reference log-probabilities of a batch, (n, 2)."""
        if self.reference is None:
            raise ValueError(f"{type(self).__name__}: reference is None, expected log-probabilities of the data set")
        return self.reference[batch.extra["index"].clamp(min=0)]

    def policy(self, model: GPT, batch: Batch) -> Tensor:
        """Return the log-probabilities that `referenced` has, under the model as it is: (n, 2)."""
        raise NotImplementedError

    @torch.no_grad()
    def check_start(self, model: GPT, batch: Batch) -> None:
        """Check before the first step that the model is the one of the reference, so the loss of DPO is ln 2.

        Raises:
            UserError: the log-probabilities of a row differ by more than rounding.
        """
        self.prepare(model)
        policy, reference = self.policy(model, batch), self.referenced(batch)
        bound = 1e-4 if model.wte.weight.dtype in (torch.float32, torch.float64) else 1e-2
        worst = (policy - reference).abs() / reference.abs().clamp(min=1.0)
        worst = torch.where(batch.extra["index"][:, None] >= 0, worst, 0.0).max()
        if not worst <= bound:
            raise UserError(
                f"reference log-probabilities differ from the model's by {float(worst):.2g} of their size before the "
                f"first step, expected at most {bound:g}: they were computed with other weights"
            )


@dataclass
class DPO(Referenced):
    """Direct preference optimisation.

    Attributes:
        loss_type: "sigmoid" is DPO, "robust" its unbiased form for labels that are wrong with probability
            label_smoothing, "ipo" the paper's IPO, "ipo-mean" IPO with h divided by the tokens of its sequence, as in
            TRL
        label_smoothing: the probability that a label is wrong, below 0.5
        length_norm: divide h by the tokens of its sequence ("sigmoid" and "robust")
    """

    loss_type: DPOLoss = "sigmoid"
    label_smoothing: float = 0.0
    length_norm: bool = False
    unit = "pair"
    figures = (
        "margin",
        "accuracy",
        "chosen_reward",
        "chosen_log_prob",
        "rejected_log_prob",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing is {self.label_smoothing:g}, expected at least 0 and less than 0.5")
        if self.loss_type not in DPOLoss.__args__:  # type: ignore[attr-defined]
            raise UserError(f"loss_type is {self.loss_type!r}, expected sigmoid, robust, ipo or ipo-mean")
        if self.loss_type.startswith("ipo"):
            if self.label_smoothing:
                raise UserError(f"label_smoothing has no effect with loss_type {self.loss_type}")
            if self.length_norm:
                raise UserError(
                    f"length_norm has no effect with loss_type {self.loss_type}; ipo-mean divides by tokens"
                )
        elif self.loss_type == "robust" and not self.label_smoothing:
            raise UserError("loss_type robust needs label_smoothing, the probability that a label is wrong")

    def policy(self, model: GPT, batch: Batch) -> Tensor:
        return sequence_log_probs(model, batch, 2 * len(batch.extra["index"]))[0].view(-1, 2)

    def loss(self, model: GPT, batch: Batch) -> Tensor:
        """Return the sums of the loss and of the figures over the pairs, (6,) fp32."""
        log_probs, tokens = sequence_log_probs(model, batch, 2 * len(batch.extra["index"]))
        ratios = log_probs.view(-1, 2) - self.referenced(batch)  # (n, 2)
        averaged = self.length_norm or self.loss_type == "ipo-mean"
        h = ratios / tokens.view(-1, 2).clamp(min=1) if averaged else ratios
        chosen, rejected = log_probs.view(-1, 2).unbind(1)
        rewards = self.beta * ratios.detach()
        margin = rewards[:, 0] - rewards[:, 1]
        values = [self.pair_loss(h[:, 0] - h[:, 1]), margin, margin > 0, rewards[:, 0], chosen, rejected]
        return total(values, batch)

    def pair_loss(self, h: Tensor) -> Tensor:
        """Return the loss of each pair, (n,), from the difference of its two log-ratios, (n,)."""
        if self.loss_type.startswith("ipo"):
            return (h - 1 / (2 * self.beta)) ** 2
        right, wrong, e = -F.logsigmoid(self.beta * h), -F.logsigmoid(-self.beta * h), self.label_smoothing
        if self.loss_type == "robust":
            return ((1 - e) * right - e * wrong) / (1 - 2 * e)
        return (1 - e) * right + e * wrong if e else right


@dataclass
class KTO(Referenced):
    """Kahneman-Tversky optimisation, for examples rated good or bad.

    kl, the reference point, is the mean of h over the mismatched completions of the micro-batch, at least 0 and without
    gradient, so unlike the other losses this one depends on the size of micro-batches. It should have several examples.

    Attributes:
        good_weight, bad_weight: factors of the losses of good and bad examples
    """

    good_weight: float = 1.0
    bad_weight: float = 1.0
    unit = "example"
    figures = ("kl", "accuracy", "margin", "log_prob")

    def policy(self, model: GPT, batch: Batch) -> Tensor:
        n = len(batch.extra["index"])
        return torch.stack([sequence_log_probs(model, b, n)[0] for b in (batch, kl_batch(batch))], 1)

    def reference_point(self, model: GPT, batch: Batch) -> Tensor:
        """Return kl, () fp32."""
        index = batch.extra["index"]
        with torch.no_grad():
            mismatched, _ = sequence_log_probs(model, kl_batch(batch), len(index))
        h = torch.where(index >= 0, mismatched - self.referenced(batch)[:, 1], 0.0)
        return (h.sum() / self.counted(batch).clamp(min=1)).clamp(min=0)

    def loss(self, model: GPT, batch: Batch) -> Tensor:
        """Return the sums of the loss and of the figures over the examples, (5,) fp32."""
        kl, good = self.reference_point(model, batch), batch.extra["good"].bool()
        log_probs, _ = sequence_log_probs(model, batch, len(good))
        ratios = log_probs - self.referenced(batch)[:, 0]
        gain = self.beta * torch.where(good, ratios - kl, kl - ratios)
        weight = torch.where(good, self.good_weight, self.bad_weight)
        reward = self.beta * torch.where(good, ratios, -ratios)
        return total([weight * (1 - torch.sigmoid(gain)), kl.expand_as(gain), gain > 0, 2 * reward, log_probs], batch)


def log_one_minus_exp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x < 0, exact near both ends (Maechler 2012)."""
    near = x > -0.6931471805599453
    return torch.where(near, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(torch.where(near, -1.0, x))))


@dataclass
class ORPO(Preference):
    """Odds ratio preference optimisation: fine-tuning on the chosen side and a preference in one loss, without a
    reference.

    Attributes:
        beta: weight of the preference (lambda in the paper)
        nll: what the NLL of the chosen sequences, prompts included, is a mean over: "pair" averages the tokens of each
            sequence and then the sequences, so the loss does not depend on the size of micro-batches; "batch" averages
            all tokens of a micro-batch, as TRL does
    """

    beta: float = 0.1
    nll: Literal["pair", "batch"] = "pair"
    unit = "pair"
    figures = ("nll", "log_odds", "accuracy", "chosen_log_prob", "rejected_log_prob")

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"beta is {self.beta:g}, expected a number above 0")
        if self.nll not in ("pair", "batch"):
            raise UserError(f"nll is {self.nll!r}, expected pair or batch")

    def loss(self, model: GPT, batch: Batch) -> Tensor:
        """Return the sums of the loss and of the figures over the pairs, (6,) fp32; log-probabilities per token."""
        n, sequence = len(batch.extra["index"]), batch.extra["sequence"]
        everything = with_prompts(batch)
        log_probs = token_log_probs(model, batch, everything)
        member, whole = (members(sequence, targets, 2 * n) for targets in (batch.targets, everything))
        means = (sums(log_probs, member) / member.sum(1).clamp(min=1)).view(-1, 2)  # (n, 2)
        nll, tokens = -sums(log_probs, whole[::2]), whole[::2].sum(1)  # (n,)
        if self.nll == "pair":
            nll = nll / tokens.clamp(min=1)
        else:
            nll = (nll.sum() / tokens.sum().clamp(min=1)).expand_as(nll)
        chosen, rejected = means.unbind(1)
        log_odds = (chosen - rejected) - (log_one_minus_exp(chosen) - log_one_minus_exp(rejected))
        loss = nll - self.beta * F.logsigmoid(log_odds)
        return total([loss, nll, log_odds, log_odds > 0, chosen, rejected], batch)


def with_prompts(batch: Batch) -> Tensor:
    """Return the targets of a batch of pairs with those of the chosen side's prompts, (B, T)."""
    sequence = batch.extra["sequence"]
    following = torch.full_like(batch.targets, IGNORE)
    following[:, :-1] = torch.where(sequence[:, 1:] == sequence[:, :-1], batch.ids[:, 1:], IGNORE)
    chosen = (sequence >= 0) & (sequence % 2 == 0)
    return torch.where(chosen & (batch.targets == IGNORE), following, batch.targets)


class Watch:
    """Sentences on a preference run that goes wrong: call it with the figures of each step; each comes once."""

    STEPS = 20  # a sign of trouble in one step may be chance

    def __init__(self) -> None:
        self.rewards: list[float] = []
        self.said: set[str] = set()

    def __call__(self, figures: dict[str, Any]) -> list[str]:
        found = {}
        if abs(margin := figures.get("margin", 0.0)) > 100:
            found["margin"] = (
                f"the margin of rewards is {margin:.0f}; in the hundreds, the pairs are learned by heart: use fewer "
                "steps, a lower learning rate or a larger beta"
            )
        self.rewards = [*self.rewards, figures.get("chosen_reward", 0.0)][-self.STEPS :]
        if len(self.rewards) == self.STEPS and (reward := sum(self.rewards) / self.STEPS) < 0:
            found["chosen"] = (
                f"the chosen texts have become less likely than at the start (reward {reward:.3g} over the last "
                f"{self.STEPS} steps): the model only learns what to avoid; use a lower learning rate or a larger beta"
            )
        new = {name: text for name, text in found.items() if name not in self.said}
        self.said |= set(new)
        return list(new.values())
