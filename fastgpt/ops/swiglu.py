"""Gated activation: act(gate) * up (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fastgpt.backend import register, select
from fastgpt.ops._common import check_float, check_like

register("swiglu")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu2": lambda x: F.relu(x).square(),
}


def swiglu(gate: Tensor, up: Tensor | None = None, *, activation: str = "silu") -> Tensor:
    """act(gate) * up.

    Args:
        gate: (..., F), or packed (..., 2F) with the gate first when up is None; up: (..., F) as gate.
        activation: "silu" (SwiGLU), "gelu" (GeGLU) or "relu2" (squared ReLU).

    Returns:
        (..., F) in gate's dtype.

    Raises:
        ValueError, TypeError: naming the argument. Source: arXiv:2002.05202.
    """
    check_float("swiglu", "gate", gate)
    if activation not in ACTIVATIONS:
        raise ValueError(f"swiglu: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(
                f"swiglu: packed gate has {gate.shape[-1]} columns, expected an even number (gate, then up)"
            )
        gate, up = gate.chunk(2, dim=-1)
    else:
        check_like("swiglu", "up", up, tuple(gate.shape), gate, (gate.dtype,), "as gate")
    select("swiglu", gate)
    return ACTIVATIONS[activation](gate) * up
