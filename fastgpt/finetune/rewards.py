"""Rewards for GRPO: functions from a file, and a model with a reward head."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgpt.core.errors import UserError
from fastgpt.finetune.batches import Sequences
from fastgpt.finetune.heads import HeadConfig, sequence_scores
from fastgpt.finetune.rollouts import Reward
from fastgpt.models.gpt import GPT


def open_reward(spec: str) -> Reward:
    """Return the function that "file.py:name" names; the file is run.

    Raises:
        UserError: the file is missing, cannot be run, or has no such function.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise UserError(f"reward is {spec!r}, expected a Python file and a function in it, as in rewards.py:right")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"reward: {file} is no Python file, expected one that ends with .py")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as e:
        raise UserError(f"reward: {file} cannot be run ({type(e).__name__}: {e})") from e
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"reward: {file} has no function {name!r}")
    found: Reward = function
    return found


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
