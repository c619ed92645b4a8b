"""Parity of gelu_mlp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastgpt import ops
from fastgpt.ops.gelu_mlp import gelu_mlp_ref, gelu_mlp_torch
from fastgpt.parity._activation import backward
from fastgpt.parity.inputs import Inputs
from fastgpt.parity.rule import MATRIX_LAYOUTS, Case, Outputs, Subject, Variant


def run_gelu_mlp(case: Case, fn: Callable[..., Any], inputs: Inputs) -> Outputs:
    """Run `fn` and return its output and gradients; shape: N, C, F, D."""
    o = dict(case.options)
    n, c, f, d = case.shape
    x = inputs.leaf((n, c), case.dtype, o.get("scale", 1.0), o.get("mean", 0.0))
    up = inputs.leaf((f, c), case.dtype, c**-0.5)
    down = inputs.leaf((d, f), case.dtype, f**-0.5 if f else 1.0)
    wide = torch.float32 if o.get("fp32_weight") else case.dtype
    up_bias = inputs.leaf((f,), wide) if o.get("bias", True) else None
    down_bias = inputs.leaf((d,), case.dtype) if o.get("bias", True) else None
    options = {name: o[name] for name in ("approximate", "recompute") if name in o}
    y = fn(x, up, up_bias, down, down_bias, **options)
    grads = {"dx": x, "dup": up, "dup_bias": up_bias, "ddown": down, "ddown_bias": down_bias}
    return backward(y, inputs.grad((n, d), case.dtype), grads)


def _bases(dtype: torch.dtype) -> Iterator[Variant]:
    yield (5, 16, 33, 9), {}
    yield (5, 16, 33, 9), {"approximate": "tanh"}
    yield (5, 16, 33, 9), {"bias": False}


def _variants(dtype: torch.dtype) -> Iterator[Variant]:
    for shape in ((1, 1, 1, 1), (70, 64, 80, 64), (3, 130, 70, 40), (129, 16, 130, 16), (0, 4, 8, 4), (3, 4, 8, 0)):
        yield shape, {}
    for n in (1, 2, 3, 5, 8, 13, 16, 31, 32, 48, 63, 64, 65):
        for approximate in ("none", "tanh"):
            yield (n, 8, 24, 8), {"approximate": approximate}
            yield (n, 17, 31, 5), {"approximate": approximate}
    for n, c, f, d in ((1, 16, 64, 16), (7, 33, 40, 17), (66, 32, 128, 32)):
        for approximate in ("none", "tanh"):
            for o in ({"bias": False}, {"recompute": True}, {"fp32_weight": True}, {"scale": 30.0}, {"mean": 100.0}):
                if dtype != torch.float32 or not o.get("fp32_weight"):
                    yield (n, c, f, d), {**o, "approximate": approximate}


SUBJECT = Subject(
    run_gelu_mlp, ops.gelu_mlp, gelu_mlp_torch, gelu_mlp_ref, _bases, _variants, MATRIX_LAYOUTS, MATRIX_LAYOUTS
)
