"""Teachers of a distillation: what their head reads, and its weight, so that nobody needs their whole logits.

A teacher is a GPT of fastgpt or a causal language model of transformers whose logits are a linear layer over its last
hidden states. The latter is tested when it is wrapped: models that scale or cap their logits are refused.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastgpt.core.errors import UserError
from fastgpt.data.batch import Batch
from fastgpt.models.gpt import GPT, Head

SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # of transformers, applied after the head


class Teacher(Protocol):
    """A frozen model.

    Attributes:
        weight: (V, C) of its head.
        bias: (V,), or None.
    """

    weight: Tensor
    bias: Tensor | None

    def hidden(self, batch: Batch) -> Tensor:
        """Return the input of the head, (B*T, C), without gradients."""


def head_of(model: GPT, what: str) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a GPT's LM head.

    Raises:
        UserError: the head was replaced, or the logits are capped.
    """
    if not isinstance(model.head, Head):
        raise UserError(f"the {what} has a {type(model.head).__name__} as its head, expected a language model's")
    if model.config.logit_softcap > 0:
        raise UserError(f"the {what} caps its logits at {model.config.logit_softcap:g}: its head cannot be distilled")
    return model.head_weight, model.head.bias


class GPTTeacher:
    """A GPT of fastgpt, put into evaluation mode and frozen."""

    def __init__(self, model: GPT) -> None:
        self.model = model.eval().requires_grad_(False)
        self.weight, self.bias = head_of(model, "teacher")

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        h = self.model.hidden(batch.ids, positions=batch.positions, doc_ids=batch.doc_ids)
        return h.view(-1, h.shape[-1])


class TransformersTeacher:
    """A causal language model of transformers, put into evaluation mode and frozen.

    Raises:
        UserError: its logits are not a linear layer over its last hidden states.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise UserError(f"the teacher {type(model).__name__} has no linear head, so it cannot be distilled")
        self.weight, self.bias = head.weight, head.bias
        self._check()

    @torch.no_grad()
    def _check(self) -> None:
        name, config = type(self.model).__name__, self.model.config
        refused = UserError(f"the teacher {name} scales or caps its logits after the head, so it cannot be distilled")
        if any(getattr(config, setting, None) not in (None, 1) for setting in SETTINGS):
            raise refused
        ids = torch.arange(min(8, self.weight.shape[0]), device=self.weight.device)[None]
        wanted = self.model(ids).logits[0].float()
        got = torch.nn.functional.linear(self.hidden(Batch(ids, ids)), self.weight, self.bias).float()
        bound = (1e-4 if self.weight.dtype == torch.float32 else 2e-2) * float(wanted.abs().max())
        if got.shape != wanted.shape or not float((got - wanted).abs().max()) <= bound:
            raise refused

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        options: dict[str, Any] = {}
        if batch.doc_ids is not None:
            t = batch.ids.shape[1]
            causal = torch.ones(t, t, dtype=torch.bool, device=batch.ids.device).tril()
            options["attention_mask"] = (causal & (batch.doc_ids[:, :, None] == batch.doc_ids[:, None]))[:, None]
        if batch.positions is not None:
            options["position_ids"] = batch.positions.expand(batch.ids.shape)
        h: Tensor = self.model.base_model(input_ids=batch.ids, use_cache=False, **options).last_hidden_state
        return h.reshape(-1, h.shape[-1])
