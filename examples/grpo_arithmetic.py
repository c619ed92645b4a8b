"""Teach a model sums by reinforcement learning with GRPO, on a CPU.

Shows: a small model first sees sums of which half have a random answer, so at most half of its answers are right. Then
it draws eight answers to each of several sums, a function rewards the right ones, and GRPO makes these more likely.
"""

from __future__ import annotations

import torch

from fastgpt.data import train_tokenizer
from fastgpt.finetune.grpo import GRPO
from fastgpt.finetune.rollouts import Prompt, RolloutLoader
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.optim import AdamW

TOKENIZER = train_tokenizer(["a"], 257)  # a token for each byte
SUMS = {f"{a}+{b}=": str(a + b) for a in range(5) for b in range(5)}


def right(completions: list[str], answer: list[str], **columns: object) -> list[float]:
    """Reward a completion that is the answer; `answer` is a column of the prompts, as in TRL."""
    return [float(completion == expected) for completion, expected in zip(completions, answer)]


def teach(model: GPT, prompts: list[Prompt], generator: torch.Generator, steps: int = 100) -> None:
    """Train on sums, half of them with a random digit as the answer."""
    ids = torch.tensor([prompt.ids for prompt in prompts])
    answers = torch.tensor([TOKENIZER.encode(prompt.columns["answer"])[0].item() for prompt in prompts])
    digits = torch.tensor(TOKENIZER.encode("0123456789").astype("int64"))
    optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        wrong = torch.rand(len(prompts), generator=generator) < 0.5
        targets = torch.full_like(ids, -100)
        targets[:, -1] = torch.where(wrong, digits[torch.randint(10, wrong.shape, generator=generator)], answers)
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        model(ids, targets).backward()
        optimizer.step()
        optimizer.zero_grad()


def main(steps: int = 30, seed: int = 0) -> list[float]:
    """Return the mean reward of each step."""
    generator = torch.Generator().manual_seed(seed)
    config = ModelConfig(n_layers=1, n_heads=4, width=64, vocab_size=257, block_size=8, init_std=0.1)
    model = GPT(config, generator=generator)
    prompts = [Prompt(tuple(TOKENIZER.prompt(text)), text, {"answer": answer}) for text, answer in SUMS.items()]
    teach(model, prompts, generator)

    task = GRPO(max_new_tokens=1)
    loader = RolloutLoader(model, TOKENIZER, prompts, [right], task, block=8, batch=64, group=8, seed=seed)
    optimizer = AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    rewards = []
    for step, batch in zip(range(steps), loader):
        loss, reward = (task.loss(model, batch) / task.counted(batch))[:2]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rewards.append(reward.item())
        if step % 10 == 9:
            print(f"step {step + 1}: mean reward {sum(rewards[-10:]) / 10:.2f}")
    return rewards


if __name__ == "__main__":
    main()
