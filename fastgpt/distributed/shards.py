"""Tensors of a model whose parameters FSDP2 spread over processes: gather them, and share them out again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastgpt.optim.state import is_sharded


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with DTensors gathered. Every process calls it, with the same names in the same order."""
    return {name: t.full_tensor() if is_sharded(t) else t for name, t in tensors.items()}  # type: ignore[attr-defined]


def share(t: Tensor, like: Any) -> Tensor:
    """Return this process's part of t, which every process has, as a DTensor placed as `like`; t itself where `like` is
    no DTensor of its shape."""
    if not is_sharded(like) or t.shape != like.shape:
        return t
    from torch.distributed.tensor import distribute_tensor

    t = t.to(like.device)
    return distribute_tensor(t, like.device_mesh, like.placements, src_data_rank=None)
