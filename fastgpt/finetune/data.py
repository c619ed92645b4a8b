"""The rows of a run: read from its files, split into training and validation, and packed by the task's loader."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgpt.core.errors import UserError
from fastgpt.data.loader import permute
from fastgpt.data.source import open_source
from fastgpt.data.tokenizer import Tokenizer
from fastgpt.finetune.augment.augment import Augmentation, Set
from fastgpt.finetune.augment.steps import steps_of
from fastgpt.finetune.batches import ExampleLoader, LabelledLoader, PairLoader, RatedLoader
from fastgpt.finetune.config import FinetuneConfig
from fastgpt.finetune.encode import Example
from fastgpt.finetune.examples import Head, Loaded, Rows, load_examples, load_labelled, load_pairs, load_ratings
from fastgpt.finetune.render import rendered, summary
from fastgpt.finetune.rewarded import load_prompts
from fastgpt.finetune.rollouts import Prompt
from fastgpt.inference.chat import Template

LOADERS: dict[str, Any] = {"dpo": PairLoader, "orpo": PairLoader, "reward": PairLoader, "kto": RatedLoader}
LOADERS |= {"sft": ExampleLoader, "distil": ExampleLoader}
HEAD_OF: dict[str, Head] = {"classify": "classification", "regress": "regression", "tag": "tags"}
Write = Callable[[Loaded[Prompt]], Loaded[Example]]
REPLAY = "replay"  # name of the set


@dataclass
class Data:
    """Rows of one or several files, in training and validation sets.

    Attributes:
        train, val: by path, the items of the task's loader.
        weights: of the training sets; None reads each row once in an epoch.
        labels: names of the classes.
        said: lines for the console.
        augmented: number of training rows that a step of the setting augment made, by its name.
    """

    name: str
    tokenizer: Tokenizer
    train: dict[str, list[Any]]
    val: dict[str, list[Any]]
    weights: list[float] | None
    labels: tuple[str, ...]
    said: list[str]
    augmented: dict[str, int] = field(default_factory=dict)

    licences: None = None

    @property
    def fingerprint(self) -> str:
        """The tokenizer's fingerprint, as a checkpoint records it."""
        return self.tokenizer.fingerprint

    def describe(self) -> str:
        """Return one line for the console and run.json."""
        rows = [sum(map(len, sets.values())) for sets in (self.train, self.val)]
        made = ", ".join(f"{n:,} by {name}" for name, n in self.augmented.items())
        training = f"{rows[0]:,} training" + (f" ({made})" if made else "")
        return f"{self.name}: {training} and {rows[1]:,} validation examples"

    def loader(self, cfg: FinetuneConfig, block: int, device: torch.device) -> Any:
        """Return the loader of the training sets."""
        return self._loader(cfg, block, device, list(self.train.values()), self.weights)

    def checks(self, cfg: FinetuneConfig, block: int, device: torch.device) -> dict[str, Any]:
        """Return the loader of each validation set by its path."""
        return {name: self._loader(cfg, block, device, [items], None) for name, items in self.val.items()}

    def _loader(
        self, cfg: FinetuneConfig, block: int, device: torch.device, sets: list[list[Any]], weights: Any
    ) -> Any:
        kind = LOADERS.get(cfg.task, LabelledLoader)
        options: dict[str, Any] = dict(packing=cfg.packing, weights=weights, seed=cfg.seed, device=device)
        return kind(sets, cfg.micro_batch, block, pad=self.tokenizer.eot, **options)


def open_data(
    cfg: FinetuneConfig,
    tokenizer: Tokenizer,
    tokenizer_path: str,
    template: Template,
    block: int,
    write: Write | None = None,
) -> Data:
    """Read the rows of `cfg.data`, and split or read the validation rows.

    Args:
        tokenizer_path: where the tokenizer is, to encode a replay corpus with.
        block: tokens T of a row.
        write: completes prompts (cfg.written).

    Raises:
        UserError: as the loaders of fastgpt/finetune/examples.py, or too few rows to hold some out.
    """
    read, labels, said = _reader(cfg, tokenizer, template, block, write), tuple(cfg.labels), list[str]()
    augmentation = Augmentation(steps_of(cfg.augment), cfg.task, Path(cfg.out), cfg.seed, cfg.device)
    sets: dict[str, Set] = {}
    for path in cfg.paths:
        loaded = read(path, labels)
        labels = loaded.labels or labels
        said += summary(loaded)
        held = set() if cfg.val_data is not None else held_out(len(loaded.items), cfg.val_fraction, cfg.seed, path)
        sets[path] = (loaded, held)
    train = {path: [item for i, item in enumerate(of.items) if i not in held] for path, (of, held) in sets.items()}
    val = {path: [of.items[i] for i in sorted(held)] for path, (of, held) in sets.items() if held}
    known = [loaded for loaded, _ in sets.values()]
    if cfg.val_data is not None:
        known.append(read(cfg.val_data, labels))
        said += summary(known[-1])
        val[cfg.val_data] = known[-1].items
    for path, items in augmentation.items(sets, known).items():
        train[path] += items
    said += augmentation.said
    weights = list(cfg.paths.values()) if isinstance(cfg.data, dict) else None
    if cfg.replay is not None:
        weights = _add_replay(cfg, cfg.replay, tokenizer_path, block, train, val)
        said.append(f"{cfg.replay}: {len(train[REPLAY]):,} texts, {cfg.replay_share:.0%} of the rows (replay)")
    first = known[0].items[0]
    shown = first.text if isinstance(first, Prompt) else rendered(first, tokenizer)
    said += ["", "the first example, what is learned in [[ ]]:", shown, ""]
    return Data(", ".join(cfg.paths), tokenizer, train, val, weights, labels, said, dict(augmentation.made))


def _reader(
    cfg: FinetuneConfig, tokenizer: Tokenizer, template: Template, block: int, write: Write | None
) -> Callable[[str, tuple[str, ...]], Loaded[Any]]:
    """Return the function that reads a path, with the names of the classes so far."""
    rows = Rows(cfg.format, cfg.columns, cfg.learn, cfg.too_long, cfg.defects, keep=bool(cfg.augment))
    if cfg.task in HEAD_OF:
        return lambda path, labels: load_labelled(path, tokenizer, block, HEAD_OF[cfg.task], labels, rows)
    longest = block - cfg.max_new_tokens  # of a prompt
    if cfg.task == "grpo":
        return lambda path, labels: load_prompts(path, tokenizer, template, longest, rows)
    if write is not None:
        return lambda path, labels: write(load_prompts(path, tokenizer, template, longest, rows))
    load: Any = {ExampleLoader: load_examples, PairLoader: load_pairs, RatedLoader: load_ratings}[LOADERS[cfg.task]]
    return lambda path, labels: load(path, tokenizer, template, block, rows)


def held_out(count: int, fraction: float, seed: int, name: str) -> set[int]:
    """Return the numbers of the items that are held out: a share drawn by the seed, at least one, and not all.

    Raises:
        UserError: there are fewer than two items, or the fraction is 0.
    """
    if fraction == 0 or count < 2:
        raise UserError(
            f"{name} has {count} examples and val_fraction is {fraction:g}, expected at least 2 examples and more "
            "than 0, or val_data"
        )
    held = min(max(1, round(fraction * count)), count - 1)
    return set(permute(np.arange(held), count, seed).tolist())


def _add_replay(
    cfg: FinetuneConfig,
    path: str,
    tokenizer_path: str,
    block: int,
    train: dict[str, list[Any]],
    val: dict[str, list[Any]],
) -> list[float]:
    """Add windows of a corpus to the training and validation sets; return the weights of all training sets.

    Raises:
        UserError: the corpus has another tokenizer, or cannot be read.
    """
    source = open_source(path, tokenizer=tokenizer_path)

    def windows(tokens: Any, most: int) -> Iterator[Example]:
        n = max(1, (len(tokens) - 1) // block)
        for i in permute(np.arange(min(n, most)), n, cfg.seed).tolist():
            ids = np.asarray(tokens.read(i * block, min(block + 1, len(tokens) - i * block)), np.uint32)
            yield Example(ids, np.arange(len(ids)) > 0, plain=True)

    sizes = [len(items) for items in train.values()]
    shares = list(cfg.paths.values()) if isinstance(cfg.data, dict) else [float(n) for n in sizes]
    rows = sum(len(item) for items in train.values() for item in items) / block
    train[REPLAY] = list(windows(source.train, math.ceil(rows * cfg.replay_share / (1 - cfg.replay_share))))
    val[REPLAY] = list(windows(source.val, cfg.eval_batches * cfg.micro_batch))
    return [(1 - cfg.replay_share) * share / sum(shares) for share in shares] + [cfg.replay_share]
