"""Batches for GRPO that the model under training writes: samples of prompts, rated by functions.

All samples for the next optimizer steps are drawn together, `group` for each prompt, by the generator of
fastgpt/inference over the same weights. A draw depends on the weights, the seed and the draw's number alone. If it
serves more than one step, the log-probabilities of its samples are kept from before the first, and a checkpoint in
between holds the samples with them; so a resumed run continues exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from fastgpt.core.errors import UserError
from fastgpt.data.batch import Batch
from fastgpt.data.loader import IGNORE
from fastgpt.finetune.batches import Sequences
from fastgpt.finetune.grpo import GRPO, Scale, advantages
from fastgpt.finetune.log_probs import token_log_probs
from fastgpt.finetune.mixture import Mixture
from fastgpt.inference import Generator, Request
from fastgpt.inference.requests import TextTokenizer
from fastgpt.models.gpt import GPT

STATE_VERSION = 1
MAX_BATCH = 64  # rows of the generator

# As in TRL: called with lists prompts, completions (texts), prompt_ids and completion_ids, and a list for each other
# column of the data; returns a number for each completion, None where there is no reward.
Reward = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class Prompt:
    """A prompt: its ids, its text, and the other columns of its row, which reward functions get."""

    ids: tuple[int, ...]
    text: str
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass
class Sample:
    """A completion of the prompt with this number; `cut` if it reached max_new_tokens."""

    prompt: int
    ids: list[int]
    text: str
    cut: bool
    reward: float = float("nan")


class RolloutLoader:
    """Batches of `batch` samples in R rows of `block` tokens, (R, T); their extra is in fastgpt/finetune/grpo.py.

    Args:
        model: the model under training.
        rewards: their sum is the reward of a sample.
        task: its temperature and max_new_tokens are those of the samples.
        batch: samples of a micro-batch.
        accumulation: micro-batches of an optimizer step.
        steps: optimizer steps that share a draw, each with its part of the samples.
        iterations: how often the samples of a draw are gone through.
        group: samples of a prompt.
        top_k, top_p: restrict the samples; the loss's probabilities are those of all tokens all the same.
        scale: as in fastgpt.finetune.grpo.advantages.
        mask_truncated: samples that reached max_new_tokens count for the group, but are not learned.
        reference: the model at the start of the run, with task.beta > 0.
        pad: id of padding.

    Attributes:
        drawn: the samples in use, for the log.

    Raises:
        UserError: the samples of a draw are no multiple of `group`, a prompt leaves no room for max_new_tokens, or the
            model has dropout.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: TextTokenizer,
        prompts: Sequence[Prompt],
        rewards: Sequence[Reward],
        task: GRPO,
        block: int,
        *,
        batch: int = 8,
        accumulation: int = 1,
        steps: int = 1,
        iterations: int = 1,
        group: int = 8,
        top_k: int | None = None,
        top_p: float = 1.0,
        scale: Scale = "group",
        mask_truncated: bool = False,
        reference: GPT | None = None,
        seed: int = 0,
        pad: int = 0,
    ) -> None:
        self.model, self.prompts, self.rewards, self.task, self.block = model, prompts, rewards, task, block
        self.batch, self.micro_batches, self.iterations, self.group = batch, accumulation * steps, iterations, group
        self.count = batch * self.micro_batches  # samples of a draw
        self.on_policy = steps * iterations == 1
        self.options: dict[str, Any] = dict(top_k=top_k, top_p=top_p, temperature=task.temperature)
        self.scale, self.mask_truncated, self.reference = scale, mask_truncated, reference
        self.seed, self.pad = seed, pad
        self._check()
        self.order = Mixture([len(prompts)], None, seed)
        self.generator = Generator(model, tokenizer, max_batch=min(self.count, MAX_BATCH), context=block, graphs=False)
        self.draws = self._place = 0
        self.drawn: list[Sample] = []
        self._batches: list[Batch] = []

    def _check(self) -> None:
        self.task.prepare(self.model)
        if self.group < 2 or self.count % self.group:
            raise UserError(
                f"a draw has {self.count} samples, expected a multiple of group, {self.group}, which is at least 2"
            )
        if self.task.beta and self.reference is None:
            raise UserError(f"beta is {self.task.beta:g}, which needs the model of the start as a reference")
        for number, prompt in enumerate(self.prompts):
            if not prompt.ids or len(prompt.ids) + self.task.max_new_tokens > self.block:
                raise UserError(
                    f"prompt {number} has {len(prompt.ids)} tokens, expected 1 to "
                    f"{self.block - self.task.max_new_tokens}: block_size less max_new_tokens"
                )

    def __iter__(self) -> RolloutLoader:
        return self

    def __next__(self) -> Batch:
        if not self._batches:
            self.drawn = self._draw()
            self._batches = self._rows(self.drawn)
            if not self.on_policy:
                self._batches = [self._with(b, "old_log_probs", self.model) for b in self._batches]
        batch = self._batches[self._place % self.micro_batches]
        self._place += 1
        if self._place == self.micro_batches * self.iterations:
            self._place, self._batches, self.draws = 0, [], self.draws + 1
        return batch

    def _draw(self) -> list[Sample]:
        """Draw and rate the samples of the next steps, those of a prompt side by side."""
        chosen = [i for _, i in self.order.take(self.draws * self.count // self.group, self.count // self.group)]
        numbers = [i for i in chosen for _ in range(self.group)]
        requests = [
            Request(self.prompts[i].ids, self.task.max_new_tokens, seed=self._seed(n), **self.options)
            for n, i in enumerate(numbers)
        ]
        results = self.generator.generate(requests)
        samples = [Sample(i, r.ids, r.text, r.finish_reason == "length") for i, r in zip(numbers, results)]
        for sample, reward in zip(samples, rate(self.rewards, self.prompts, samples)):
            sample.reward = reward
        return samples

    def _seed(self, n: int) -> int:
        text = f"{self.seed} {self.draws} {n}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1

    def _rows(self, samples: list[Sample]) -> list[Batch]:
        """Return the micro-batches of a draw."""
        rewards = torch.tensor([sample.reward for sample in samples])
        advantage = advantages(rewards.view(-1, self.group), self.scale).view(-1)
        learned = [0 if self.mask_truncated and s.cut else len(s.ids) for s in samples]
        common = {"tokens_per_sample": torch.tensor(max(1, sum(learned)) / len(samples))}
        parts = [slice(at, at + self.batch) for at in range(0, self.count, self.batch)]
        of_samples = {"advantage": advantage, "reward": rewards.nan_to_num(0.0), "index": torch.arange(self.count)}
        batches = [
            self._pack(samples[part], common | {name: t[part] for name, t in of_samples.items()}) for part in parts
        ]
        if self.reference is not None and self.task.beta:
            batches = [self._with(b, "ref_log_probs", self.reference) for b in batches]
        return batches

    def _pack(self, samples: list[Sample], extra: dict[str, torch.Tensor]) -> Batch:
        ids = [np.array([*self.prompts[s.prompt].ids, *s.ids]) for s in samples]
        targets = [whole[1:].copy() for whole in ids]
        for sample, target in zip(samples, targets):
            target[: len(target) if self.mask_truncated and sample.cut else len(target) - len(sample.ids)] = IGNORE
        rows = Sequences([whole[:-1] for whole in ids], targets, self.block, "best-fit", self.pad).rows()
        device = self.model.wte.weight.device
        parts = {name: torch.from_numpy(np.ascontiguousarray(part)).to(device) for name, part in rows._asdict().items()}
        extra = extra | {"sequence": parts["doc_ids"].long()}
        return Batch(**parts, extra={name: t.to(device) for name, t in extra.items()})

    @torch.no_grad()
    def _with(self, batch: Batch, name: str, model: GPT) -> Batch:
        """Return a batch with the log-probabilities under a model of its targets."""
        values = token_log_probs(model, batch, temperature=self.task.temperature)
        return batch._replace(extra={**batch.extra, name: values})

    def state_dict(self) -> dict[str, Any]:
        """Return the number of draws, the prompts' digest and, between the steps of a draw, its samples with their
        log-probabilities."""
        state = {"version": STATE_VERSION, "seed": self.seed, "data": self._digest(), "draws": self.draws}
        if self._batches:
            state |= {"place": self._place, "samples": [asdict(sample) for sample in self.drawn]}
            if not self.on_policy:
                learned = [(b.extra["old_log_probs"], b.targets != IGNORE) for b in self._batches]
                state["old_log_probs"] = [values[mask].tolist() for values, mask in learned]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly after `state`.

        Raises:
            UserError: it is of other prompts, of another seed or of draws of another size.
        """
        for key, here in (("version", STATE_VERSION), ("seed", self.seed), ("data", self._digest())):
            if state.get(key) != here:
                raise UserError(f"cannot resume the samples: {key} was {state.get(key)}, now it is {here}")
        self.draws, self._place = int(state["draws"]), int(state.get("place", 0))
        self.drawn = [Sample(**sample) for sample in state.get("samples", ())]
        if not self.drawn:
            self._batches = []
            return
        if len(self.drawn) != self.count or self._place >= self.micro_batches * self.iterations:
            raise UserError(f"cannot resume within a draw of {len(self.drawn)} samples, now it has {self.count}")
        self._batches = self._rows(self.drawn)
        for n, values in enumerate(state.get("old_log_probs", ())):
            batch = self._batches[n]
            place = torch.zeros(batch.targets.shape)
            place[batch.targets.cpu() != IGNORE] = torch.tensor(values)
            self._batches[n] = batch._replace(extra={**batch.extra, "old_log_probs": place.to(batch.ids.device)})

    def _digest(self) -> str:
        text = repr([self.group, self.count, *((p.ids, sorted(p.columns.items())) for p in self.prompts)])
        return hashlib.sha256(text.encode()).hexdigest()

    def close(self) -> None:
        """Do nothing: no thread runs ahead."""


def rate(rewards: Sequence[Reward], prompts: Sequence[Prompt], samples: Sequence[Sample]) -> list[float]:
    """Return the sum of the rewards of each sample; NaN where no function has a reward.

    Raises:
        UserError: a function returns another number of values than there are samples, or a value that is not finite.
    """
    rows = [prompts[s.prompt] for s in samples]
    names = {name for row in rows for name in row.columns}
    columns = {name: [row.columns.get(name) for row in rows] for name in sorted(names)}
    columns |= dict(prompts=[row.text for row in rows], completions=[s.text for s in samples])
    found = np.full((len(rewards), len(samples)), np.nan)
    for i, function in enumerate(rewards):
        name, values = getattr(function, "__name__", type(function).__name__), []
        ids = dict(prompt_ids=[list(row.ids) for row in rows], completion_ids=[s.ids for s in samples])
        values = list(function(**ids, **columns))
        if len(values) != len(samples):
            raise UserError(f"reward {name} returned {len(values)} values for {len(samples)} completions")
        if wrong := [v for v in values if v is not None and not np.isfinite(v)]:
            raise UserError(f"reward {name} returned {wrong[0]}, expected a finite number or None")
        found[i] = [np.nan if v is None else float(v) for v in values]
    rated = ~np.isnan(found).all(0)
    return list(np.where(rated, np.nansum(found, 0), np.nan).tolist())
