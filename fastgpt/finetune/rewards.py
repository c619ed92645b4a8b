"""Rewards for GRPO from a model with a reward head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastgpt.core.errors import UserError
from fastgpt.finetune.batches import Sequences
from fastgpt.finetune.heads import HeadConfig, sequence_scores
from fastgpt.models.gpt import GPT


class LearnedReward:
    """The score of a reward model for prompt and completion, as a reward function.

    Args:
        model: with a head of kind "reward", and the tokenizer of the model under training.
        batch: rows of tokens in one pass.

    Raises:
        UserError: the head is of another kind.
    """

    def __init__(self, model: GPT, head: HeadConfig, batch: int = 16) -> None:
        if head.kind != "reward":
            raise UserError(f"the reward model has a head of kind {head.kind}, expected reward")
        self.model, self.head, self.batch = model.eval(), head, batch

    @torch.no_grad()
    def __call__(
        self, *, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        """Return the score of each completion.

        Raises:
            UserError: prompt and completion are longer than the reward model's context.
        """
        texts = [np.array([*prompt, *completion]) for prompt, completion in zip(prompt_ids, completion_ids)]
        longest, most = max(map(len, texts), default=0), self.model.max_positions
        if longest > most:
            raise UserError(f"a completion has {longest} tokens with its prompt, expected at most {most}")
        device = self.model.wte.weight.device
        sequences = Sequences(texts, texts, most, "best-fit", self.head.pad_id or 0)
        scores = torch.empty(len(texts), device=device)
        for at in range(0, len(sequences.places), self.batch):
            rows = sequences.rows(slice(at, at + self.batch))
            ids, positions, numbers = (
                torch.from_numpy(np.ascontiguousarray(part)).to(device).long()
                for part in (rows.ids, rows.positions, rows.doc_ids)
            )
            here = numbers[numbers >= 0].unique()
            options = dict(doc_ids=numbers.int(), positions=positions)
            scores[here] = sequence_scores(self.model, self.head, ids, numbers, len(texts), **options)[here, 0]
        return [float(score) for score in scores.tolist()]
