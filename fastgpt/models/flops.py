"""FLOP of a training step per token, for model FLOP utilisation.

A weight that multiplies takes 2 FLOP per token in the forward pass, 2 in the gradient of its input and 2 in its own
gradient. Frozen weights have none of the latter, and no gradient passes below the first parameter that trains:

    weights     2 N + 2 N_b + 2 N_t     N all, N_b those that the gradient passes, N_t those that train
    attention   4 L A T + 8 L_b A T     L blocks, L_b those that the gradient passes, A = n_heads * head_dim

If all train, these are 6 N and 12 L A T. What recomputation adds is not counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from torch import nn


def flops_per_token(model: Any, block_size: int) -> dict[str, float]:
    """Return forward and backward FLOP per token of a sequence of T = block_size, of a GPT:

    full: formula of nanoGPT and PaLM, which counts all of attention and no position embedding;
    causal: formula of llm.c and Megatron, which counts attention below the diagonal, and the position embedding.
    """
    c, blocks = model.config, len(model.blocks)
    lowest = min((_depth(name, blocks) for name, p in model.named_parameters() if p.requires_grad), default=math.inf)
    weights = positions = 0
    for name, elements, trains in _multiplied(model):
        depth = blocks + 1 if name == "wte.weight" else _depth(name, blocks)  # here as the tied head
        passed = lowest <= blocks if depth > blocks else depth >= lowest
        products = 2 * elements * (1 + passed + trains)
        weights += products
        positions += products if name == "wpe.weight" else 0
    passed_blocks = blocks - min(max(lowest, 0), blocks)
    attention = (4 * blocks + 8 * passed_blocks) * c.n_heads * c.d_head * block_size
    return {"full": float(weights - positions + attention), "causal": float(weights + attention / 2)}


def _depth(name: str, blocks: int) -> int:
    """Return the place of a parameter from the embeddings, -1, to the head, `blocks` + 1."""
    if block := re.match(r"blocks\.(\d+)\.", name):
        return int(block[1])
    return -1 if name.startswith(("wte.", "wpe.")) else blocks + name.startswith("head.")


def _multiplied(model: Any) -> Iterator[tuple[str, int, bool]]:
    """Yield name, elements and whether it trains of each weight, quantised ones included. A token embedding that is not
    the head's weight is left out: a lookup multiplies nothing."""
    as_head = model.config.tied and getattr(model.head, "weight", None) is None
    for name, p in model.named_parameters():
        if name != "wte.weight" or as_head:
            yield name, p.numel(), p.requires_grad
    for name, module in model.named_modules():
        store = getattr(module, "store", None)
        if isinstance(store, nn.Module):
            yield f"{name}.store", math.prod(store.shape), False  # type: ignore[arg-type]
