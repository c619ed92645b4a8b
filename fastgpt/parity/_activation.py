"""Shared parts of the parity of bias_gelu and swiglu."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastgpt.parity.rule import Outputs

EXTREMES: tuple[dict[str, Any], ...] = ({"mean": 1e4}, {"mean": -1e4}, {"scale": 1e-3}, {"scale": 5.0})


def backward(y: Tensor, dy: Tensor, leaves: dict[str, Tensor | None]) -> Outputs:
    """Run backward and return the output and the gradients by name."""
    y.backward(dy)
    return {"y": y, **{n: t.grad for n, t in leaves.items() if t is not None and t.grad is not None}}
