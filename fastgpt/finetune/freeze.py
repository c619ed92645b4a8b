"""Which parameters of a GPT train, and at which share of the learning rate, by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from fastgpt.core.errors import UserError
from fastgpt.models.gpt import GPT

EMBEDDINGS = r"^(wte|wpe)\."


def freeze(model: nn.Module, patterns: Iterable[str]) -> int:
    """Freeze the parameters in whose name one of the regular expressions is found; return how many elements that is.

    Raises:
        UserError: an expression is none or is found in no name, or nothing is left to train.
    """
    named = dict(model.named_parameters())
    frozen: set[str] = set()
    for pattern in patterns:
        try:
            found = [name for name in named if re.search(pattern, name)]
        except re.error as e:
            raise UserError(f"freeze: {pattern!r} is not a regular expression ({e})") from e
        if not found:
            raise UserError(
                f"freeze: {pattern!r} is found in no parameter's name, expected a part of one like {next(iter(named))}"
            )
        frozen |= set(found)
    if not any(p.requires_grad for name, p in named.items() if name not in frozen):
        raise UserError("freeze: no parameter is left to train")
    for name in frozen:
        named[name].requires_grad_(False)
    return sum(named[name].numel() for name in frozen)


def freeze_first(model: GPT, n: int) -> int:
    """Freeze the embeddings and the first n blocks; return how many elements that is. A tied head is frozen with them.

    Raises:
        UserError: the model has fewer blocks.
    """
    blocks = len(model.blocks)
    if not 0 <= n <= blocks:
        raise UserError(f"freeze_first is {n}, expected 0 to {blocks}, the model's blocks")
    return freeze(model, [EMBEDDINGS, *(rf"^blocks\.{i}\." for i in range(n))]) if n else 0


def layer_decay(model: GPT, decay: float) -> dict[str, float]:
    """Return the `lr_ratios` of GPT.param_groups for learning rates that fall from the head down.

    The head and the last norm have ratio 1, the last block `decay`, the one below decay^2, and so on down to the
    embeddings (a tied head is one). What does not train has no ratio.

    Raises:
        UserError: decay is not in (0, 1].
    """
    if not 0 < decay <= 1:
        raise UserError(f"layer_decay is {decay}, expected more than 0, at most 1")
    n = len(model.blocks)
    ratios = {rf"^blocks\.{i}\.": decay ** (n - i) for i in range(n)} | {EMBEDDINGS: decay ** (n + 1)}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    return {pattern: ratio for pattern, ratio in ratios.items() if any(re.search(pattern, name) for name in trained)}
