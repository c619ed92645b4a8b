"""GRPO in `fastgpt finetune`: prompts from files, rewards by name, validation by reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastgpt.core.errors import UserError
from fastgpt.core.functions import open_function
from fastgpt.data.load import load_tokenizer
from fastgpt.data.read.defects import Defect
from fastgpt.data.read.files import find_files
from fastgpt.data.read.format import Format
from fastgpt.data.read.rows import Row, open_rows
from fastgpt.data.tokenizer import Tokenizer
from fastgpt.finetune.examples import Counts, Loaded, Rows
from fastgpt.finetune.formats import Wrong, messages
from fastgpt.finetune.head_files import load_pretrained
from fastgpt.finetune.rewards import LearnedReward
from fastgpt.finetune.rollouts import Prompt, Reward, Sample, rate
from fastgpt.inference import Generator, Request
from fastgpt.inference.chat import Template


def open_rewards(specs: Sequence[str], tokenizer: Tokenizer, device: torch.device) -> list[Reward]:
    """Return the rewards that specs name: FILE.py:FUNCTION, which runs with the rights of the run, or the folder of a
    reward model (`model` in a run with task reward).

    Raises:
        UserError: one cannot be opened, or a reward model has another tokenizer.
    """
    found: list[Reward] = []
    for spec in specs:
        if not Path(spec).is_dir():
            found.append(open_function(spec, "reward"))
            continue
        if load_tokenizer(spec).fingerprint != tokenizer.fingerprint:
            raise UserError(f"reward: {spec} has another tokenizer than the base, expected the same")
        model, head = load_pretrained(spec, device=device)
        if head.kind == "regression":  # config.json does not tell a reward from a number
            head = replace(head, kind="reward")
        found.append(LearnedReward(model, head))
    return found


def load_prompts(
    path: str | Path, tokenizer: Tokenizer, template: Template, longest: int, rows: Rows
) -> Loaded[Prompt]:
    """Read prompts, each from the column "prompt" (a text, or messages for the template); a row's other columns go to
    the reward functions.

    Args:
        longest: tokens of a prompt; longer ones are left out.

    Raises:
        UserError: no file, no prompt that can be used, or a defect (with file and line) unless they are skipped.
    """
    form, counts, items = Format(mode=rows.defects), Counts(), []
    column = rows.columns.get("prompt", "prompt")

    def count(defect: Defect) -> None:
        counts.left_out[defect.kind] += 1

    for file in find_files(path, form, count).files:
        for row in open_rows(file, form, count):
            counts.rows += 1
            try:
                text, ids = _prompt(row, column, tokenizer, template)
            except Wrong as wrong:
                row.report(wrong.kind, wrong.problem, wrong.remedy)
                continue
            if len(ids) > longest:
                counts.left_out[f"longer than {longest} tokens"] += 1
                continue
            counts.tokens += len(ids)
            items.append(Prompt(tuple(ids), text, {k: v for k, v in row.fields.items() if k != column}))
    if not items:
        raise UserError(f"{path} has no prompt to train on, of {counts.rows} rows")
    return Loaded(str(path), items, counts)


def _prompt(row: Row, column: str, tokenizer: Tokenizer, template: Template) -> tuple[str, list[int]]:
    value = row.fields.get(column)
    if isinstance(value, str) and value.strip():
        text = value.rstrip(" ")
        return text, tokenizer.prompt(text)
    if not isinstance(value, list) or not value:
        raise Wrong("no prompt", f"the field {column!r} is {value!r:.40}, expected a text or messages", "repair it")
    turns = messages(value, column)
    text = template.render(turns)
    return text, [*tokenizer.prefix, *(int(i) for i in tokenizer.encode(text, specials=True))]


@dataclass
class RewardCheck:
    """Validation by reward: one completion of each held-out prompt, drawn with the run's settings and fixed seeds."""

    prompts: list[Prompt]
    rewards: list[Reward]
    tokenizer: Tokenizer
    max_new_tokens: int
    block: int
    batch: int

    @torch.no_grad()
    def __call__(self, run: Any, batches: int | None) -> dict[str, float]:
        """Return val_loss, the mean reward's negative, and the reward."""
        prompts = self.prompts if batches is None else self.prompts[: batches * self.batch]
        run.model.eval()
        generator = Generator(run.model, self.tokenizer, max_batch=32, context=self.block, graphs=False)
        asked = [Request(p.ids, self.max_new_tokens, temperature=0.0) for p in prompts]
        samples = [Sample(i, r.ids, r.text, False) for i, r in enumerate(generator.generate(asked))]
        run.model.train()
        values = [v for v in rate(self.rewards, prompts, samples) if v == v]
        if not values:
            raise UserError("reward: no completion of the validation prompts has a reward, expected at least one")
        mean = sum(values) / len(values)
        return {"val_loss": -mean, "reward": mean}
