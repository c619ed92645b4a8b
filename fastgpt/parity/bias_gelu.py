"""Parity of bias_gelu."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastgpt import ops
from fastgpt.ops.bias_gelu import bias_gelu_ref, bias_gelu_torch
from fastgpt.parity._activation import EXTREMES, backward
from fastgpt.parity.inputs import Inputs
from fastgpt.parity.rule import Case, Outputs, Subject, Variant


def run_bias_gelu(case: Case, fn: Callable[..., Any], inputs: Inputs) -> Outputs:
    """Run `fn`, bias + GELU, and return its output and gradients."""
    o = dict(case.options)
    x = inputs.leaf(case.shape, case.dtype, o.get("scale", 1.0), o.get("mean", 0.0))
    dtype = torch.float32 if o.get("fp32_weight") else case.dtype
    bias = inputs.leaf(case.shape[-1:], dtype, min(1.0, o.get("scale", 1.0))) if o.get("bias", True) else None
    y = fn(x, bias, approximate=o.get("approximate", "none"))
    return backward(y, inputs.grad(case.shape, case.dtype), {"dx": x, "dbias": bias})


def _bases(dtype: torch.dtype) -> Iterator[Variant]:
    yield (2, 3, 33), {}
    yield (2, 3, 33), {"approximate": "tanh"}
    yield (2, 3, 64), {}  # 16-byte accesses where the layout allows them


def _variants(dtype: torch.dtype) -> Iterator[Variant]:
    for shape in ((1, 1), (33, 1), (1, 7), (2, 3, 770), (67, 128), (2, 5000), (300, 33), (10500, 8), (5,), (0, 16)):
        yield shape, {}
    for o in ({"bias": False}, {"fp32_weight": True}, *EXTREMES):
        if dtype != torch.float32 or not o.get("fp32_weight"):
            yield (6, 33), o
            yield (6, 33), {**o, "approximate": "tanh"}
    yield (67, 128), {"approximate": "tanh"}


SUBJECT = Subject(run_bias_gelu, ops.bias_gelu, bias_gelu_torch, bias_gelu_ref, _bases, _variants)
