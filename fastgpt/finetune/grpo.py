"""GRPO: reinforcement learning from several samples of each prompt, whose rewards are compared with one another.

With r_t = p(token t) / p_old(token t), p_old the model's probability when the sample was drawn, and A the advantage of
the token's sample:

    loss of a token = -min(r_t A, clip(r_t, 1 - epsilon, 1 + epsilon_high) A) + beta kl_t
    kl_t = q_t - log q_t - 1,  q_t = p_ref(token t) / p(token t)         (times r_t with kl_correction)
    A = (reward - mean of the group) / (standard deviation of the group + 1e-4)

Batches come from fastgpt/finetune/rollouts.py; `Batch.extra` has

    sequence, index   as in fastgpt/finetune/preference.py, one sequence for each sample
    advantage, reward (n,) fp32
    tokens_per_sample () fp32, mean over all samples drawn together
    old_log_probs     (B, T) fp32, of the targets; without it the samples are those of the model as it is
    ref_log_probs     (B, T) fp32, with beta > 0

Sources: Shao et al. (arXiv 2402.03300), Liu et al. (2503.20783, "dr_grpo" and advantages without the deviation), Yu et
al. (2503.14476, "dapo" and epsilon_high), the estimate of the KL divergence by Schulman (2020). The losses equal those
of TRL 1.16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fastgpt.core.errors import UserError
from fastgpt.data.batch import Batch
from fastgpt.finetune.log_probs import members, sums, token_log_probs
from fastgpt.finetune.preference import Preference, total
from fastgpt.models.gpt import GPT

GRPOLoss = Literal["grpo", "bnpo", "dr_grpo", "dapo"]
Scale = Literal["group", "batch", "none"]


def advantages(rewards: Tensor, scale: Scale = "group") -> Tensor:
    """Return rewards (P, G) of G samples for each of P prompts less the group's mean, divided by a standard deviation.

    Args:
        rewards: fp32; NaN has no reward: it does not count for the group and its advantage is 0
        scale: whose deviation divides; "none" as in Dr. GRPO
    """
    centred = rewards - rewards.nanmean(1, keepdim=True)
    if scale != "none":
        rows = rewards if scale == "group" else rewards.view(1, -1)
        count = (~rows.isnan()).sum(1, keepdim=True)
        variance = ((rows - rows.nanmean(1, keepdim=True)) ** 2).nansum(1, keepdim=True) / (count - 1)
        centred = centred / (variance.sqrt() + 1e-4)
    return centred.nan_to_num(0.0)


@dataclass
class GRPO(Preference):
    """Group-relative policy optimisation.

    Attributes:
        loss_type: how the losses of tokens become that of a step. "grpo": the mean over the tokens of each sample, then
            over samples; "bnpo": the mean over the tokens of a micro-batch, which makes it depend on their size;
            "dapo": the sum over tokens, divided by the mean number of tokens of the samples drawn together; "dr_grpo":
            the sum over tokens, divided by max_new_tokens
        epsilon, epsilon_high: how far r_t may leave 1 below and above; epsilon_high is epsilon if None
        beta: weight of the KL divergence from the start weights; 0 needs no reference
        kl_correction: weigh kl_t by r_t, which is right for samples of an older model
        temperature: that of the samples; it divides the logits of the loss too
        max_new_tokens: that of the samples
    """

    loss_type: GRPOLoss = "dapo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    beta: float = 0.0
    kl_correction: bool = True
    temperature: float = 1.0
    max_new_tokens: int = 256
    unit = "sample"
    figures = ("reward", "tokens", "clipped", "kl")

    def __post_init__(self) -> None:
        if self.loss_type not in get_args(GRPOLoss):
            raise UserError(f"loss_type is {self.loss_type!r}, expected one of {', '.join(get_args(GRPOLoss))}")
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        for name, value in (("epsilon", self.epsilon), ("epsilon_high", high), ("temperature", self.temperature)):
            if not value > 0:
                raise UserError(f"{name} is {value:g}, expected a number above 0")
        if not self.beta >= 0:
            raise UserError(f"beta is {self.beta:g}, expected 0 or more")

    def loss(self, model: GPT, batch: Batch) -> Tensor:
        """Return the sums of the loss and of the figures over the samples, (5,) fp32. "clipped" and "kl" are means over
        the tokens of a sample."""
        extra, n = batch.extra, len(batch.extra["index"])
        log_probs = token_log_probs(model, batch, temperature=self.temperature)  # (B, T)
        member = members(extra["sequence"], batch.targets, n)  # (n, B*T)
        ratio = torch.exp(log_probs - extra.get("old_log_probs", log_probs.detach()))
        advantage = extra["advantage"][extra["sequence"].clamp(min=0)]  # (B, T)
        high = 1 + (self.epsilon if self.epsilon_high is None else self.epsilon_high)
        loss = -torch.min(ratio * advantage, ratio.clamp(1 - self.epsilon, high) * advantage)
        clipped = torch.where(advantage > 0, ratio > high, (ratio < 1 - self.epsilon) & (advantage < 0))
        kl = self.divergence(log_probs, ratio, extra["ref_log_probs"]) if self.beta else torch.zeros_like(loss)
        loss = loss + self.beta * kl
        tokens = member.sum(1)
        some = tokens.clamp(min=1)
        means = [sums(values, member) / some for values in (clipped.to(loss.dtype), kl)]
        return total([self.of_samples(sums(loss, member), tokens, batch), extra["reward"], tokens, *means], batch)

    def divergence(self, log_probs: Tensor, ratio: Tensor, reference: Tensor) -> Tensor:
        """Return kl_t, (B, T)."""
        log_q = reference - log_probs
        kl = torch.exp(log_q) - log_q - 1
        return kl * ratio if self.kl_correction else kl

    def of_samples(self, loss: Tensor, tokens: Tensor, batch: Batch) -> Tensor:
        """Return the loss of each sample, (n,), whose mean is that of the step.

        Args:
            loss, tokens: (n,), sums over the tokens of each sample
        """
        if self.loss_type == "grpo":
            return loss / tokens.clamp(min=1)
        if self.loss_type == "dr_grpo":
            return loss / self.max_new_tokens
        if self.loss_type == "dapo":
            return loss / batch.extra["tokens_per_sample"]
        present = batch.extra["index"] >= 0
        loss, tokens = torch.where(present, loss, 0.0), torch.where(present, tokens, 0)
        return (loss.sum() / tokens.sum().clamp(min=1)).expand_as(loss)
