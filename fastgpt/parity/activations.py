"""Parity of bias_gelu and swiglu."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.ops.bias_gelu import bias_gelu_ref, bias_gelu_torch
from fastgpt.ops.swiglu import ACTIVATIONS, swiglu_ref, swiglu_torch
from fastgpt.parity.inputs import Inputs
from fastgpt.parity.rule import Case, Outputs, Subject, Variant

EXTREMES: tuple[dict[str, Any], ...] = ({"mean": 1e4}, {"mean": -1e4}, {"scale": 1e-3}, {"scale": 5.0})


def _backward(y: Tensor, dy: Tensor, leaves: dict[str, Tensor | None]) -> Outputs:
    y.backward(dy)
    return {"y": y, **{n: t.grad for n, t in leaves.items() if t is not None and t.grad is not None}}


def run_bias_gelu(case: Case, fn: Callable[..., Any], inputs: Inputs) -> Outputs:
    """Output and gradients of bias + GELU by `fn`."""
    o = dict(case.options)
    x = inputs.leaf(case.shape, case.dtype, o.get("scale", 1.0), o.get("mean", 0.0))
    dtype = torch.float32 if o.get("fp32_weight") else case.dtype
    bias = inputs.leaf(case.shape[-1:], dtype, min(1.0, o.get("scale", 1.0))) if o.get("bias", True) else None
    y = fn(x, bias, approximate=o.get("approximate", "none"))
    return _backward(y, inputs.grad(case.shape, case.dtype), {"dx": x, "dbias": bias})


def run_swiglu(case: Case, fn: Callable[..., Any], inputs: Inputs) -> Outputs:
    """Output and gradients of the gated activation by `fn`; packed: the case's shape is (..., 2F)."""
    o = dict(case.options)
    packed = o.get("packed", False)
    gate = inputs.leaf(case.shape, case.dtype, o.get("scale", 1.0), o.get("mean", 0.0))
    up = None if packed else inputs.leaf(case.shape, case.dtype)
    y = fn(gate, up, activation=o.get("activation", "silu"))
    width = case.shape[-1] // 2 if packed else case.shape[-1]
    return _backward(y, inputs.grad((*case.shape[:-1], width), case.dtype), {"dgate": gate, "dup": up})


def _bias_gelu_bases(dtype: torch.dtype) -> Iterator[Variant]:
    yield (2, 3, 33), {}
    yield (2, 3, 33), {"approximate": "tanh"}
    yield (2, 3, 64), {}  # in 16-byte pieces where the layout allows


def _bias_gelu_variants(dtype: torch.dtype) -> Iterator[Variant]:
    for shape in ((1, 1), (33, 1), (1, 7), (2, 3, 770), (67, 128), (2, 5000), (300, 33), (10500, 8), (5,), (0, 16)):
        yield shape, {}
    for o in ({"bias": False}, {"fp32_weight": True}, *EXTREMES):
        if dtype != torch.float32 or not o.get("fp32_weight"):
            yield (6, 33), o
            yield (6, 33), {**o, "approximate": "tanh"}
    yield (67, 128), {"approximate": "tanh"}


def _swiglu_bases(dtype: torch.dtype) -> Iterator[Variant]:
    yield (2, 3, 33), {}
    yield (2, 3, 66), {"packed": True}
    yield (2, 3, 64), {}  # in 16-byte pieces where the layout allows
    yield (2, 3, 128), {"packed": True}


def _swiglu_variants(dtype: torch.dtype) -> Iterator[Variant]:
    for shape in ((1, 1), (33, 1), (1, 7), (2, 3, 770), (67, 128), (2, 5000), (5,), (0, 16)):
        yield shape, {}
        yield (*shape[:-1], 2 * shape[-1]), {"packed": True}
    for activation in ACTIVATIONS:
        for o in ({}, {"packed": True}, *EXTREMES[2 if activation == "relu2" else 0 :]):  # 1e8 is over fp16's range
            yield (6, 66), {"activation": activation, **o}


SUBJECTS = {
    "bias_gelu": Subject(
        run_bias_gelu, ops.bias_gelu, bias_gelu_torch, bias_gelu_ref, _bias_gelu_bases, _bias_gelu_variants
    ),
    "swiglu": Subject(run_swiglu, ops.swiglu, swiglu_torch, swiglu_ref, _swiglu_bases, _swiglu_variants),
}
