"""Estimate the device memory of training adapters, from settings alone, and what fits a device.

As fastgpt/training/memory.py for a whole model, with these differences: the base is frozen and may be quantised;
gradients and moments are those of the adapters, in fp32; each layer also keeps D(x) A^T, and with dropout a mask; and
a product over a quantised weight makes one matrix dense.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from fastgpt.core.device import dtype_of
from fastgpt.finetune.lora import Lora, add_lora
from fastgpt.finetune.quantised import KINDS, stored_bytes
from fastgpt.models.gpt import GPT
from fastgpt.models.recompute import Level
from fastgpt.models.weights.segments import linear_layers, lora_layers
from fastgpt.nn import Linear
from fastgpt.training.config import TrainConfig
from fastgpt.training.memory import LEVELS, Plan, Shape, Target, plan, shape_of

BASES: tuple[str | None, ...] = (None, *KINDS)


class Sizes(NamedTuple):
    """Sizes of a model with adapters: of the model itself; (rows, columns) of the blocks' matrices; elements of the
    adapters; columns of D(x) A^T, and of the inputs that have a dropout mask, over all layers and in the largest
    block."""

    shape: Shape
    matrices: list[tuple[int, int]]
    elements: int
    products: int
    masks: int
    block_products: int
    block_masks: int


class Setup(NamedTuple):
    """A way to train that fits: how the base is kept (None in the run's dtype), what is recomputed, and the largest
    micro-batch, with its plan."""

    base: str | None
    recompute: str
    micro_batch: int
    plan: Plan


def sizes_of(cfg: TrainConfig, lora: Lora) -> Sizes:
    """Count the sizes on the meta device; cfg.model.vocab_size must be set.

    Raises:
        UserError: a target of the adapters is found in no layer's name.
    """
    with torch.device("meta"):
        model = GPT(cfg.model)
    matrices = [(m.out_features, m.in_features) for m in linear_layers(model).values() if isinstance(m, Linear)]
    layers = add_lora(model, lora)
    blocks = [list(lora_layers(block).values()) for block in model.blocks]
    products = [sum(m.lora_A.shape[0] for m in block) for block in blocks]
    masks = [sum(m.in_features for m in block if lora.dropout > 0) for block in blocks]
    elements = sum(m.lora_A.numel() + m.lora_B.numel() for m in layers.values())
    return Sizes(shape_of(cfg), matrices, elements, sum(products), sum(masks), max(products), max(masks))


def plan_adapters(cfg: TrainConfig, sizes: Sizes, base: str | None, target: Target) -> Plan:
    """Plan the memory of a device on which adapters train.

    Args:
        cfg: model, block_size, micro_batch, batch_tokens, dtype and recompute of the run.
        sizes: `sizes_of(cfg, lora)`.
        base: how the base is kept: None in the dtype of cfg, or a kind of fastgpt.finetune.quantised.
    """
    n, dtype, shape = cfg.sequences * cfg.block_size, dtype_of(cfg.dtype, target.kind), sizes.shape
    w, m = dtype.itemsize, cfg.model
    whole = plan(replace(cfg, graphs=False), shape, target, trains_head=False)
    weights = whole.parameters - shape.parameters * w + stored_bytes(shape.parameters, sizes.matrices, base, dtype)
    every, largest = n * (w * sizes.products + sizes.masks), n * (w * sizes.block_products + sizes.block_masks)
    activations, block = whole.activations + every, whole.block
    if cfg.recompute == "block":
        activations, block = whole.activations, whole.block + largest
    elif m.norm_placement == "pre":  # the first norm's input needs no gradient
        activations -= n * (w * m.width + (8 if m.norm == "layer" else 4))
    matrix = max(rows * columns for rows, columns in sizes.matrices)
    dense = 0 if base is None else matrix * (w if w == 4 else w + 4)  # 8 bits are widened in fp32
    return replace(
        whole,
        parameters=weights + 4 * sizes.elements,
        gradients=4 * sizes.elements,
        masters=0,
        moments=8 * sizes.elements,
        activations=activations,
        block=block + dense,
    )


def setups(cfg: TrainConfig, sizes: Sizes, target: Target, most: int = 64) -> Iterator[Setup]:
    """Yield, for each way to keep the base, the first recompute level that fits `target`, with its largest micro-batch.

    Args:
        cfg, sizes: as in `plan_adapters`; micro_batch, batch_tokens and recompute are not read.
        most: the largest micro-batch that is of interest.
    """
    for base in BASES:
        found = (_largest(cfg, sizes, base, level, target, most) for level in LEVELS)
        if (setup := next(filter(None, found), None)) is not None:
            yield setup


def _largest(cfg: TrainConfig, sizes: Sizes, base: str | None, level: Level, target: Target, most: int) -> Setup | None:
    """Return the largest micro-batch that fits, up to `most`, by bisection; None if not even one row fits."""
    low, high = 0, most
    while low < high:
        rows = (low + high + 1) // 2
        fits = _rows(cfg, sizes, base, level, target, rows).needed <= target.usable
        low, high = (rows, high) if fits else (low, rows - 1)
    return Setup(base, level, low, _rows(cfg, sizes, base, level, target, low)) if low else None


def _rows(cfg: TrainConfig, sizes: Sizes, base: str | None, level: Level, target: Target, rows: int) -> Plan:
    own = replace(cfg, micro_batch=rows, batch_tokens=rows * cfg.block_size, recompute=level)
    return plan_adapters(own, sizes, base, target)


def report(cfg: TrainConfig, lora: Lora, target: Target) -> list[str]:
    """Return lines for the console: for each way to keep the base what fits `target`, and how.

    Args:
        cfg: as in `setups`.
    """
    sizes = sizes_of(cfg, lora)
    found = {setup.base: setup for setup in setups(cfg, sizes, target)}
    name = str(dtype_of(cfg.dtype, target.kind)).removeprefix("torch.")
    lines = [f"{target.name}: {target.usable / 1e9:.1f} GB of {target.memory / 1e9:.1f} GB to plan with"]
    for base in BASES:
        said = f"  base in {base or name}: "
        if (setup := found.get(base)) is None:
            least = _rows(cfg, sizes, base, "block", target, 1).needed / 1e9
            lines.append(f"{said}does not fit, a row of {cfg.block_size} tokens needs {least:.1f} GB")
            continue
        p = setup.plan
        lines.append(
            f"{said}micro-batch {setup.micro_batch} of {cfg.block_size} tokens, recompute {setup.recompute}: "
            f"{p.needed / 1e9:.1f} GB, of which parameters {p.parameters / 1e9:.1f} GB"
        )
    return lines
