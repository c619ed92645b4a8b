"""The learning rate over a run."""

from __future__ import annotations

import math

from fastgpt.training.config import TrainConfig


def learning_rate(cfg: TrainConfig, step: int, last_step: int) -> float:
    """Return the learning rate of step 0, 1, ...: linear warm-up, then the schedule down to min_lr_ratio * lr at
    last_step."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    done = min(1.0, (step - cfg.warmup_steps) / max(1, last_step - cfg.warmup_steps))
    if cfg.schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * done))
    elif cfg.schedule == "linear":
        share = 1 - done
    elif cfg.schedule == "wsd":  # warm-up, stable, decay
        share = min(1.0, (1 - done) / cfg.decay_fraction) if cfg.decay_fraction > 0 else 1.0
    else:
        share = 1.0
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * share)
