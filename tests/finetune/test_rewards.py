"""Rewards: a model's score is that of each text alone, and a function comes from a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from arithmetic import Characters, make, prompts
from preference_rows import VOCAB, T, rows
from small_models import model_of

from fastgpt.core.errors import UserError
from fastgpt.core.functions import open_function
from fastgpt.finetune.grpo import GRPO
from fastgpt.finetune.heads import HeadConfig, attach
from fastgpt.finetune.rewards import LearnedReward
from fastgpt.finetune.rollouts import RolloutLoader
from fastgpt.models.gpt import GPT

HEAD = HeadConfig("reward", pad_id=0)


def with_head(model: GPT) -> GPT:
    attach(model, HEAD, torch.Generator().manual_seed(0))
    return model


def test_a_learned_reward_is_the_score_of_each_text_alone() -> None:
    model = with_head(model_of(vocab_size=VOCAB, block_size=T).float())
    data = rows(7)
    columns = dict(prompt_ids=[row.prompt for row in data], completion_ids=[row.first for row in data])
    found = LearnedReward(model, HEAD, batch=2)(**columns, prompts=[], anything=[])
    for row, score in zip(data, found):
        alone = model.head(model.hidden(torch.tensor([row.prompt + row.first])))[0, -1, 0]
        assert score == pytest.approx(alone.item(), rel=1e-4, abs=1e-5)
    assert len({round(score, 6) for score in found}) == 7
    with pytest.raises(UserError, match="has 33 tokens with its prompt, expected at most 32"):
        LearnedReward(model, HEAD)(prompt_ids=[[3] * 30], completion_ids=[[4] * 3])
    with pytest.raises(UserError, match="of kind regression, expected reward"):
        LearnedReward(model, HeadConfig("regression"))


def test_samples_are_rated_by_a_model() -> None:
    m, task = make(), GRPO(max_new_tokens=3)
    judge = LearnedReward(with_head(make(1)), HEAD)
    loader = RolloutLoader(m, Characters(), prompts(2), [judge], task, 8, batch=8, group=4)
    batch = next(loader)
    expected = judge(
        prompt_ids=[loader.prompts[s.prompt].ids for s in loader.drawn], completion_ids=[s.ids for s in loader.drawn]
    )
    assert batch.extra["reward"].tolist() == pytest.approx(expected) and m.training


def test_a_function_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def length(completions, **columns):\n    return [len(c) for c in completions]\nx = 1\n")
    assert open_function(f"{file}:length", "reward")(completions=["ab", ""]) == [2, 0]
    for spec, message in (
        ("length", "expected a Python file and a function"),
        (f"{tmp_path / 'other.py'}:length", "expected a Python file and a function"),
        (f"{file}:x", "has no function 'x'"),
        (f"{file}:width", "has no function 'width'"),
    ):
        with pytest.raises(UserError, match=message):
            open_function(spec, "reward")
    file.write_text("1 / 0\n")
    with pytest.raises(UserError, match="cannot be run .ZeroDivisionError"):
        open_function(f"{file}:length", "reward")
