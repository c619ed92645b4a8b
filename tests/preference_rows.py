"""Preference pairs and rated examples for tests, as packed batches and as the features that TRL's collators take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt.data.batch import Batch

VOCAB, T = 97, 32


@dataclass
class Row:
    """A prompt with two completions, or with its own and another's completion."""

    prompt: list[int]
    first: list[int]
    second: list[int]
    good: bool = True


def rows(n: int, seed: int = 0) -> list[Row]:
    """Return n random rows; sequences of 5 to 16 tokens, so two fit a packed row."""
    g = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (), generator=g))
        return torch.randint(3, VOCAB, (size,), generator=g).tolist()

    return [Row(ids(2, 7), ids(3, 10), ids(3, 10), i % 3 != 1) for i in range(n)]


def packed(sequences: list[tuple[list[int], list[int]]], index: list[int], shift: bool = False) -> Batch:
    """Pack (prompt, completion) sequences, two a row of T tokens; `shift` leaves the last token of each to the targets
    alone."""
    n, width = len(sequences), T
    ids, targets = torch.zeros(-(-n // 2), width, dtype=torch.int64), torch.full((-(-n // 2), width), -100)
    sequence, positions = torch.full_like(ids, -1), torch.zeros_like(ids)
    for i, (prompt, completion) in enumerate(sequences):
        text = torch.tensor(prompt + completion)
        row, start = i // 2, 0 if i % 2 == 0 else int((sequence[i // 2] >= 0).sum())
        span = slice(start, start + len(text) - shift)
        ids[row, span], sequence[row, span] = text[: len(text) - shift], i
        positions[row, span] = torch.arange(len(text) - shift)
        targets[row, start + len(prompt) - 1 : start + len(text) - 1] = text[len(prompt) :]
    return Batch(ids, targets, sequence.int(), positions, {"sequence": sequence, "index": torch.tensor(index)})


def numbered(batch: Batch, index: list[int]) -> Batch:
    """Return a batch whose pairs are these rows of the data set."""
    return batch._replace(extra={**batch.extra, "index": torch.tensor(index)})


def pair_batch(data: list[Row], shift: bool = False) -> Batch:
    sides = [(row.prompt, side) for row in data for side in (row.first, row.second)]
    return packed(sides, list(range(len(data))), shift)


def rated_batch(data: list[Row], shift: bool = False) -> Batch:
    index = list(range(len(data)))
    batch = packed([(row.prompt, row.first) for row in data], index, shift)
    other = packed([(row.prompt, row.second) for row in data], index, shift)
    kl = dict(ids=other.ids, targets=other.targets, doc_ids=other.doc_ids, positions=other.positions)
    extra = {f"kl_{name}": value for name, value in kl.items()}
    extra |= {"kl_sequence": other.extra["sequence"], "good": torch.tensor([row.good for row in data])}
    return batch._replace(extra={**batch.extra, **extra})


def pair_features(data: list[Row], reference: Tensor) -> list[dict[str, Any]]:
    return [
        {
            "prompt_ids": row.prompt,
            "chosen_ids": row.first,
            "rejected_ids": row.second,
            "ref_chosen_logps": float(chosen),
            "ref_rejected_logps": float(rejected),
        }
        for row, (chosen, rejected) in zip(data, reference)
    ]


def rated_features(data: list[Row], reference: Tensor) -> list[dict[str, Any]]:
    return [
        {
            "prompt_ids": row.prompt,
            "completion_ids": row.first,
            "KL_completion_ids": row.second,
            "label": row.good,
            "ref_logps": float(own),
            "ref_KL_logps": float(other),
        }
        for row, (own, other) in zip(data, reference)
    ]


def sample_batch(data: list[Row], **extra: Tensor) -> Batch:
    """Return the samples `first` of rows; tensors in `extra` have a value for each sample, (n,), or for each of its
    learned tokens, (n, most tokens)."""
    batch = packed([(row.prompt, row.first) for row in data], list(range(len(data))))
    found = dict(batch.extra)
    for name, values in extra.items():
        if values.dim() == 2:
            placed = torch.zeros(batch.ids.shape, dtype=values.dtype)
            for i, row in enumerate(data):
                placed[(found["sequence"] == i) & (batch.targets != -100)] = values[i, : len(row.first)]
            values = placed
        found[name] = values
    return batch._replace(extra=found)


def sample_features(data: list[Row], **extra: Tensor) -> dict[str, Tensor]:
    """Return the inputs of GRPOTrainer's loss: prompts padded on the left, completions on the right."""
    most, longest = max(len(row.prompt) for row in data), max(len(row.first) for row in data)
    prompts = torch.tensor([[0] * (most - len(row.prompt)) + row.prompt for row in data])
    completions = torch.tensor([row.first + [0] * (longest - len(row.first)) for row in data])
    prompt_mask = torch.tensor([[0] * (most - len(row.prompt)) + [1] * len(row.prompt) for row in data])
    mask = torch.tensor([[1] * len(row.first) + [0] * (longest - len(row.first)) for row in data])
    return dict(
        prompt_ids=prompts, prompt_mask=prompt_mask, completion_ids=completions, completion_mask=mask, **extra
    ) | {"num_items_in_batch": mask.sum()}
