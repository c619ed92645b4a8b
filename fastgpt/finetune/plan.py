"""`fastgpt finetune --plan`: what a run needs, what fits a device, and how."""

from __future__ import annotations

import dataclasses

from fastgpt.core.device import default_device
from fastgpt.core.errors import UserError
from fastgpt.finetune.base import base_config
from fastgpt.finetune.config import FinetuneConfig
from fastgpt.finetune.lora import Lora
from fastgpt.finetune.memory import report
from fastgpt.models.config import ModelConfig
from fastgpt.training.memory import Target, plan, shape_of
from fastgpt.training.plan import card, target_of

LONGEST = 1024  # tokens of a row, unless block_size is set


def lora_of(cfg: FinetuneConfig) -> Lora:
    """Return the adapters of the settings; of rank 16 where they have none."""
    rank = cfg.lora.rank or 16
    alpha = 2.0 * rank if cfg.lora.alpha is None else cfg.lora.alpha
    return Lora(rank, alpha, cfg.lora.rslora, cfg.lora.dropout, tuple(cfg.lora.targets))


def block_of(cfg: FinetuneConfig, base: ModelConfig) -> int:
    """Return the tokens of a row.

    Raises:
        UserError: more than the base has positions.
    """
    most = base.block_size or cfg.block_size or LONGEST
    block = cfg.block_size or min(LONGEST, most)
    if block > most:
        raise UserError(f"block_size is {block}, expected at most {most}, the positions of the base")
    return block


def target(device: str) -> Target:
    """Return a card by its name, or a device of this machine."""
    known = None if device in ("auto", "cpu") or device.startswith("cuda") else card(device)
    return known or target_of(default_device(device))


def lines_of(cfg: FinetuneConfig) -> list[str]:
    """Return lines on the memory of all weights and of adapters over bases of several kinds.

    Raises:
        UserError: the base or the device is unknown.
    """
    base = base_config(cfg)
    block = block_of(cfg, base)
    train, device = cfg.to_train(base, block, 1), target(cfg.device)
    whole = plan(train, shape_of(train), device)
    rows = f"micro-batch {cfg.micro_batch} of {block} tokens, recompute {cfg.recompute}"
    fits = "fits" if whole.needed <= device.usable else "does not fit"
    lora = lora_of(cfg)
    return [
        f"all weights: {rows}: {whole.needed / 1e9:.1f} GB, which {fits} {device.usable / 1e9:.1f} GB",
        f"adapters of rank {lora.rank}, largest micro-batch:",
        *report(dataclasses.replace(train, micro_batch=1, batch_tokens=block), lora, device),
        "by a model of the memory; not measured",
    ]
