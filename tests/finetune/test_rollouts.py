"""Batches for GRPO: what they hold, that they continue exactly, what is refused; and that GRPO raises its reward."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from arithmetic import Characters, make, prompts, right, teach
from torch import Tensor

from fastgpt.core.errors import UserError
from fastgpt.data.batch import Batch
from fastgpt.finetune.grpo import GRPO, advantages
from fastgpt.finetune.rollouts import Prompt, RolloutLoader, Sample, rate
from fastgpt.models.gpt import GPT

SUMS = prompts(2)


def loader(model: GPT, task: GRPO | None = None, **options: Any) -> RolloutLoader:
    task = task or GRPO(max_new_tokens=3)
    options = dict(batch=4, accumulation=2, group=4) | options
    return RolloutLoader(model, Characters(), SUMS, [right], task, 8, **options)


def move(model: GPT) -> None:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))


def same(a: Batch, b: Batch) -> bool:
    parts = [*zip(a[:4], b[:4]), *((a.extra[name], b.extra[name]) for name in a.extra)]
    return a.extra.keys() == b.extra.keys() and all(torch.equal(x, y) for x, y in parts)


def test_a_batch_holds_the_samples_of_the_model() -> None:
    m = make()
    batches = loader(m, steps=2)
    drawn: list[Batch] = [next(batches) for _ in range(4)]
    samples = batches.drawn
    assert len(samples) == 16 and all(len({s.prompt for s in samples[i : i + 4]}) == 1 for i in range(0, 16, 4))
    assert len({tuple(s.ids) for s in samples}) > 4  # each has a seed of its own
    rewards = torch.tensor(right([], [s.text for s in samples], [SUMS[s.prompt].columns["answer"] for s in samples]))
    expected = advantages(rewards.view(4, 4)).view(-1)
    assert torch.equal(torch.cat([b.extra["advantage"] for b in drawn]), expected)
    assert torch.equal(torch.cat([b.extra["reward"] for b in drawn]), rewards)
    for n, batch in enumerate(drawn):
        assert float(batch.extra["tokens_per_sample"]) == pytest.approx(sum(len(s.ids) for s in samples) / 16)
        for i, sample in enumerate(samples[4 * n : 4 * n + 4]):
            mine = batch.extra["sequence"] == i
            learned = mine & (batch.targets != -100)
            assert batch.targets[learned].tolist() == sample.ids
            whole = torch.tensor([[*SUMS[sample.prompt].ids, *sample.ids]])
            assert batch.ids[mine].tolist() == whole[0, :-1].tolist()
            exact = m(whole[:, :-1])[0].log_softmax(-1).gather(1, whole[0, 1:, None])[-len(sample.ids) :, 0]
            torch.testing.assert_close(batch.extra["old_log_probs"][learned], exact, rtol=1e-4, atol=1e-5)


def test_samples_of_the_model_as_it_is_have_ratio_1() -> None:
    m = make()
    for options in (dict(steps=2), {}):
        batch = next(loader(m, **options))
        task = GRPO(max_new_tokens=3, loss_type="grpo")
        values = task.loss(m, batch) / task.counted(batch)
        # with r = 1 every token's loss is -A
        assert values[0].item() == pytest.approx(-batch.extra["advantage"].mean().item(), abs=1e-6)
        assert values[3] == 0 and ("old_log_probs" in batch.extra) == bool(options)


@pytest.mark.parametrize("taken", [0, 1, 3, 4, 6, 8])
def test_a_resumed_loader_continues_exactly(taken: int) -> None:
    m = make()
    task = GRPO(max_new_tokens=3, beta=0.1)
    options: dict[str, Any] = dict(task=task, iterations=2, seed=3, reference=make(7))
    first = loader(m, **options)
    for _ in range(taken):
        next(first)
    move(m)  # by then, the weights are not those that drew the samples
    state = json.loads(json.dumps(first.state_dict()))
    second = loader(m, **options)
    second.load_state_dict(state)
    for _ in range(6):
        assert same(next(first), next(second))


def test_a_draw_depends_on_seed_and_number() -> None:
    m = make()
    batches = loader(m, batch=8, accumulation=1)
    first, second = next(batches), next(batches)
    assert not torch.equal(first.targets, second.targets)
    assert same(next(loader(m, batch=8, accumulation=1)), first)
    assert not torch.equal(next(loader(m, batch=8, accumulation=1, seed=1)).targets, first.targets)
    one = RolloutLoader(m, Characters(), SUMS[:1], [right], GRPO(max_new_tokens=3), 8, batch=8, group=8)
    texts = [[next(one), *(s.text for s in one.drawn)][1:] for _ in range(2)]
    assert texts[0] != texts[1]  # of the same prompt


def test_a_truncated_sample_counts_for_its_group_but_is_not_learned() -> None:
    m = make()
    batches = loader(m, mask_truncated=True)
    batch = next(batches)
    for i, sample in enumerate(batches.drawn[:4]):
        learned = ((batch.extra["sequence"] == i) & (batch.targets != -100)).sum()
        assert learned == (0 if sample.cut else len(sample.ids))
    assert len({s.cut for s in batches.drawn}) == 2
    m.zero_grad()
    GRPO(max_new_tokens=3).loss(m, batch)[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_a_sample_weighs_the_same_in_any_micro_batch(loss_type: Any) -> None:
    m = make()
    task = GRPO(loss_type=loss_type, max_new_tokens=3)

    def values(**options: Any) -> Tensor:
        batches = loader(m, batch=options.pop("batch"), steps=1, **options)
        found = [next(batches) for _ in range(batches.micro_batches)]
        return sum((task.loss(m, b) for b in found), torch.zeros(5))

    torch.testing.assert_close(values(batch=8, accumulation=1), values(batch=2, accumulation=4), rtol=1e-5, atol=1e-6)


def test_rewards_are_added_and_checked() -> None:
    samples = [Sample(0, [3], "3", False), Sample(1, [4], "4", False)]
    some = [Prompt((1,), "a", {"answer": "3"}), Prompt((2,), "b", {"answer": "5"})]
    seen: dict[str, Any] = {}

    def length(completions: list[str], **columns: Any) -> list[float | None]:
        seen.update(columns)
        return [None, 2.0]

    assert rate([right, length], some, samples) == [1.0, 2.0]
    assert seen == dict(prompts=["a", "b"], answer=["3", "5"], prompt_ids=[[1], [2]], completion_ids=[[3], [4]])
    nothing = rate([length], some, samples)
    assert nothing[0] != nothing[0] and nothing[1] == 2.0
    assert advantages(torch.tensor([nothing])).tolist() == [[0.0, 0.0]]
    with pytest.raises(UserError, match="reward <lambda> returned 1 values for 2 completions"):
        rate([lambda **_: [1.0]], some, samples)
    with pytest.raises(UserError, match="returned inf, expected a finite number"):
        rate([lambda **_: [1.0, float("inf")]], some, samples)


@pytest.mark.parametrize(
    "make_it, message",
    [
        (lambda m: loader(m, group=3), "8 samples, expected a multiple of group, 3"),
        (lambda m: loader(m, GRPO(max_new_tokens=5)), "prompt 0 has 4 tokens, expected 1 to 3"),
        (lambda m: loader(m, GRPO(max_new_tokens=3, beta=0.1)), "needs the model of the start"),
        (lambda m: GRPO(loss_type="ppo"), "loss_type is 'ppo'"),  # type: ignore[arg-type]
        (lambda m: GRPO(epsilon=0), "epsilon is 0"),
        (lambda m: GRPO(temperature=0), "temperature is 0"),
        (lambda m: GRPO(beta=-1), "beta is -1"),
        (lambda m: loader(m).load_state_dict(loader(m, seed=2).state_dict()), "seed was 2, now it is 0"),
        (lambda m: loader(m).load_state_dict(loader(m, group=8).state_dict()), "cannot resume the samples: data"),
    ],
)
def test_settings_are_refused(make_it: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_it(make())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_grpo_raises_the_reward(seed: int) -> None:
    """Teach sums of which half are wrong, then let GRPO reward the right ones: about 0.25 to 0.6 in 40 steps."""
    m, data = make(seed), prompts()
    teach(m, data, seed)
    task, optimizer = GRPO(max_new_tokens=1), torch.optim.AdamW(m.parameters(), 3e-3, weight_decay=0)
    batches = RolloutLoader(m, Characters(), data, [right], task, 8, batch=128, group=16, seed=seed)
    rewards = []
    for _ in range(40):
        batch = next(batches)
        values = task.loss(m, batch) / task.counted(batch)
        optimizer.zero_grad()
        values[0].backward()
        optimizer.step()
        rewards.append(values[1].item())
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.15
