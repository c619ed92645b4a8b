"""Parity of swiglu."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastgpt import ops
from fastgpt.ops.swiglu import ACTIVATIONS, swiglu_ref, swiglu_torch
from fastgpt.parity._activation import EXTREMES, backward
from fastgpt.parity.inputs import Inputs
from fastgpt.parity.rule import Case, Outputs, Subject, Variant


def run_swiglu(case: Case, fn: Callable[..., Any], inputs: Inputs) -> Outputs:
    """Run `fn`, the gated activation, and return its output and gradients; a packed case has the shape (..., 2F)."""
    o = dict(case.options)
    packed = o.get("packed", False)
    gate = inputs.leaf(case.shape, case.dtype, o.get("scale", 1.0), o.get("mean", 0.0))
    up = None if packed else inputs.leaf(case.shape, case.dtype)
    y = fn(gate, up, activation=o.get("activation", "silu"))
    width = case.shape[-1] // 2 if packed else case.shape[-1]
    return backward(y, inputs.grad((*case.shape[:-1], width), case.dtype), {"dgate": gate, "dup": up})


def _bases(dtype: torch.dtype) -> Iterator[Variant]:
    yield (2, 3, 33), {}
    yield (2, 3, 66), {"packed": True}
    yield (2, 3, 64), {}  # 16-byte accesses where the layout allows them
    yield (2, 3, 128), {"packed": True}


def _variants(dtype: torch.dtype) -> Iterator[Variant]:
    for shape in ((1, 1), (33, 1), (1, 7), (2, 3, 770), (67, 128), (2, 5000), (5,), (0, 16)):
        yield shape, {}
        yield (*shape[:-1], 2 * shape[-1]), {"packed": True}
    for activation in ACTIVATIONS:
        # relu2 without means of 1e4: 1e8 overflows in fp16
        for o in ({}, {"packed": True}, *EXTREMES[2 if activation == "relu2" else 0 :]):
            yield (6, 66), {"activation": activation, **o}


SUBJECT = Subject(run_swiglu, ops.swiglu, swiglu_torch, swiglu_ref, _bases, _variants)
