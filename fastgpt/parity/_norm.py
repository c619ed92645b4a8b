"""Shared parts of the parity of layer_norm and rms_norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastgpt.parity.inputs import Inputs
from fastgpt.parity.rule import Case, Outputs, Variant


def run_norm(case: Case, fn: Callable[..., Any], inputs: Inputs) -> Outputs:
    """Run `fn`, a LayerNorm or an RMSNorm (no bias, but a weight offset), and return its outputs and gradients."""
    o = dict(case.options)
    width = case.shape[-1:]
    param = torch.float32 if o.get("fp32_weight") else case.dtype
    x = inputs.leaf(case.shape, case.dtype, o.get("scale", 1.0), o.get("mean", 0.0))
    residual = inputs.leaf(case.shape, case.dtype) if o.get("residual") else None
    weight = inputs.leaf(width, param) if o.get("weight", True) else None
    bias = inputs.leaf(width, param) if o.get("bias", case.op == "layer_norm") else None
    params = (weight, bias) if case.op == "layer_norm" else (weight,)
    x_bias = inputs.leaf(width, torch.float32 if o["x_bias"] == "fp32" else case.dtype) if o.get("x_bias") else None
    more = {"weight_offset": o["weight_offset"]} if "weight_offset" in o else {}
    out = fn(x, *params, o.get("eps", 1e-5), residual=residual, x_bias=x_bias, **more)
    y, s = out if residual is not None else (out, None)
    outputs = {n: t for n, t in (("y", y), ("sum", s)) if t is not None}
    grads = [inputs.grad(case.shape, case.dtype) for _ in outputs]
    torch.autograd.backward(list(outputs.values()), grads)
    leaves = {"dx": x, "dresidual": residual, "dweight": weight, "dbias": bias, "dx_bias": x_bias}
    return {**outputs, **{n: t.grad for n, t in leaves.items() if t is not None and t.grad is not None}}


def bases(dtype: torch.dtype) -> Iterator[Variant]:
    """Yield the shapes and options that run in every layout."""
    yield (2, 3, 33), {"residual": True}
    yield (2, 3, 33), {}
    yield (2, 3, 64), {"residual": True}  # 16-byte accesses where the layout allows them
    yield (2, 3, 64), {"residual": True, "x_bias": True}


def variants(dtype: torch.dtype, own: list[dict[str, Any]]) -> Iterator[Variant]:
    """Yield other shapes and options; own: options that only one of the norms has."""
    shapes = ((1, 1), (1, 7), (2, 3, 770), (67, 128), (3, 1024), (2, 5000), (2, 9001))
    for shape in (*shapes, (9, 2080), (2, 8448), (34, 4104)):  # the last has more rows than one wave of blocks
        yield shape, {"residual": True}
    x_bias = {"residual": True, "x_bias": True}
    for shape in ((1, 1), (2, 3, 770), (67, 128), (3, 1024), (2, 5000), (2, 9001), (2, 8448), (34, 4104)):
        yield shape, x_bias
    yield (67, 128), {}
    for o in ({}, {"residual": True}, {"weight": False}, *own):  # one column: the gradient of RMSNorm nearly cancels
        if dtype != torch.float32 or not o.get("fp32_weight"):
            yield (33, 1), o
    yield (7, 1), {}
    yield (33, 2), {}
    mixed = {"fp32_weight": True, "residual": True}
    biased = ({**mixed, "x_bias": True}, {**x_bias, "x_bias": "fp32"}, {**x_bias, "weight": False, "bias": False})
    for o in ({}, *own, {"weight": False}, mixed, *biased, {"eps": 1e-2}):
        if dtype != torch.float32 or "fp32" not in (o.get("x_bias"), o.get("fp32_weight") and "fp32"):
            yield (6, 33), o
    yield (5, 96), {"mean": 300.0, "scale": 0.5}
    yield (5, 96), {"scale": 1e-4, "residual": False}
    yield (0, 16), {"residual": True}
    yield (0, 16), x_bias
