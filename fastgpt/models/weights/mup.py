"""Fold the multipliers of µP into weights, since no other project's configuration has them.

logits = r norm_f(x) head^T      r = mup_base_width / width goes into the weight and bias of the final norm
scores = s q k^T                 s sqrt(head_dim) goes into the queries, which others scale by 1 / sqrt(head_dim)
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable

import torch
from torch import Tensor

from fastgpt.core.errors import UserError
from fastgpt.models.config import ModelConfig

Read = Callable[[str], Tensor]  # a parameter by fastgpt's name


def without_mup(c: ModelConfig) -> ModelConfig:
    """Return the settings of the model that `folded` makes the weights of."""
    return dataclasses.replace(c, mup_base_width=None, mup_base_head_dim=None)


def changes_queries(c: ModelConfig) -> bool:
    """Return whether `folded` changes weights of the blocks."""
    return c.score_scale != c.attn_scale


def folded(c: ModelConfig, read: Read) -> tuple[ModelConfig, Read]:
    """Return settings without µP, and a `read` of weights that give the same logits with them.

    Raises:
        UserError: the model has no final norm that the multiplier of the logits could go into.
    """
    if c.width_ratio != 1.0 and c.norm_placement == "post":
        raise UserError("export: model.mup_base_width needs a final norm to go into, expected model.norm_placement pre")
    queries = (c.score_scale or 0.0) * math.sqrt(c.d_head) if changes_queries(c) else 1.0

    def read_folded(name: str) -> Tensor:
        t = read(name)
        if name.startswith("norm_f.") and c.width_ratio != 1.0:
            return _scaled(t, c.width_ratio, c.norm_offset if name.endswith("weight") else 0.0)
        if queries == 1.0:
            return t
        if c.qk_norm and re.search(r"\.q_norm\.(weight|bias)$", name):
            return _scaled(t, queries, c.norm_offset if name.endswith("weight") else 0.0)
        if not c.qk_norm and re.search(r"\.qkv\.(weight|bias)$", name):
            rows = c.n_heads * c.d_head
            t = _wide(t)
            return torch.cat((t[:rows] * queries, t[rows:]))
        return t

    return without_mup(c), read_folded


def _scaled(t: Tensor, factor: float, offset: float) -> Tensor:
    """Scale what a norm multiplies by, t + offset."""
    return (_wide(t) + offset) * factor - offset


def _wide(t: Tensor) -> Tensor:
    """Return t in fp32 or fp64, so that a product is rounded once, to the dtype of the file."""
    return t.detach().to(torch.promote_types(t.dtype, torch.float32))
