"""Token embedding plus learned position rows: weight[ids] + position_weight[positions]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.backend import checks_values, register, select

register("embedding")


def _check_ids(name: str, ids: Tensor, rows: int) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"embedding: {name} is {ids.dtype}, expected torch.int64")
    if not torch.compiler.is_compiling() and ids.numel() and checks_values(ids):
        low, high = (int(v) for v in ids.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(f"embedding: {name} reach from {low} to {high}, expected 0 to {rows - 1}")


def embedding(
    ids: Tensor, weight: Tensor, position_weight: Tensor | None = None, *, positions: Tensor | None = None
) -> Tensor:
    """weight[ids], plus position_weight[positions] if given.

    Args:
        ids: (B, T) int64; weight: (V, C); position_weight: (T_max, C), weight's dtype.
        positions: (T,) or (B, T) int64; default 0, 1, 2, ... along T.

    Returns:
        (B, T, C) in weight's dtype.

    Raises:
        ValueError, TypeError: naming the argument; ids and positions out of range are found on CPU.
    """
    _check_ids("ids", ids, weight.shape[0])
    select("embedding", weight)
    out = F.embedding(ids, weight)
    if position_weight is None:
        return out
    if positions is not None:
        _check_ids("positions", positions, position_weight.shape[0])
        return out + F.embedding(positions, position_weight)
    if ids.shape[-1] > position_weight.shape[0]:
        raise ValueError(
            f"embedding: ids have {ids.shape[-1]} positions, position_weight only {position_weight.shape[0]} rows"
        )
    return out + position_weight[: ids.shape[-1]]
