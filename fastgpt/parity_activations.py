"""Parity runners and cases of the activations (bias_gelu, swiglu); fastgpt/parity.py holds the rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastgpt.parity import Case, Inputs

BASE: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {"bias_gelu": ((6, 33), {}), "swiglu": ((6, 33), {})}


def _backward(y: Tensor, dy: Tensor, leaves: dict[str, Tensor | None]) -> dict[str, Tensor]:
    y.backward(dy)
    return {"y": y, **{n: t.grad for n, t in leaves.items() if t is not None and t.grad is not None}}


def run_bias_gelu(case: Case, fn: Callable[..., Any], inputs: Inputs) -> dict[str, Tensor]:
    """Output and gradients of bias + GELU by `fn`."""
    o = dict(case.options)
    x = inputs.leaf(case.shape, case.dtype, o.get("scale", 1.0), o.get("mean", 0.0))
    dtype = torch.float32 if o.get("fp32_weight") else case.dtype
    bias = inputs.leaf(case.shape[-1:], dtype, min(1.0, o.get("scale", 1.0))) if o.get("bias", True) else None
    y = fn(x, bias, approximate=o.get("approximate", "none"))
    return _backward(y, inputs.tensor(case.shape, case.dtype), {"dx": x, "dbias": bias})


def run_swiglu(case: Case, fn: Callable[..., Any], inputs: Inputs) -> dict[str, Tensor]:
    """Output and gradients of the gated activation by `fn`; packed: the case's shape is (..., 2F)."""
    o = dict(case.options)
    packed = o.get("packed", False)
    gate = inputs.leaf(case.shape, case.dtype, o.get("scale", 1.0), o.get("mean", 0.0))
    up = None if packed else inputs.leaf(case.shape, case.dtype)
    y = fn(gate, up, activation=o.get("activation", "silu"))
    width = case.shape[-1] // 2 if packed else case.shape[-1]
    return _backward(y, inputs.tensor((*case.shape[:-1], width), case.dtype), {"dgate": gate, "dup": up})


def variants(op: str) -> Iterator[tuple[tuple[int, ...], dict[str, Any]]]:
    """Shapes and options beside the base shape that goes through every layout."""
    extremes: list[dict[str, Any]] = [{"mean": 1e4}, {"mean": -1e4}, {"scale": 1e-3}, {"scale": 5.0}]
    if op == "bias_gelu":
        for shape in ((1, 1), (1, 7), (2, 3, 770), (67, 128), (2, 5000), (300, 33), (5,), (0, 16)):
            yield shape, {}
        for o in ({"bias": False}, {"fp32_weight": True}, *extremes):
            yield (6, 33), o
            yield (6, 33), {**o, "approximate": "tanh"}
        yield (67, 128), {"approximate": "tanh"}
    elif op == "swiglu":
        for shape in ((1, 1), (1, 7), (2, 3, 770), (67, 128), (2, 5000), (5,), (0, 16)):
            yield shape, {}
            yield (*shape[:-1], 2 * shape[-1]), {"packed": True}
        for activation in ("silu", "gelu", "relu2"):
            for o in ({}, {"packed": True}, *extremes[2 if activation == "relu2" else 0 :]):  # 1e8 is over fp16's range
                yield (6, 66), {"activation": activation, **o}
