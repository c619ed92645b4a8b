"""Parity of linear without gradients, with weights in the dtype of x, in bf16 for fp32 x, and in int8 with a scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastgpt import ops
from fastgpt.ops.linear import linear_ref, linear_torch
from fastgpt.parity.inputs import Inputs
from fastgpt.parity.rule import MATRIX_LAYOUTS, Case, Outputs, Subject, Variant

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 13, 16, 31, 64)  # tiles of one to six rows, and several of them


def run_linear(case: Case, fn: Callable[..., Any], inputs: Inputs) -> Outputs:
    """Run `fn` and return its output; shape: N, C, F."""
    o = dict(case.options)
    n, c, f = case.shape
    x = inputs.tensor((n, c), case.dtype, o.get("scale", 1.0), o.get("mean", 0.0))
    scale, kind = None, o.get("weight", case.dtype)
    if kind == torch.int8:
        draws = torch.randint(-127, 128, (f, c), generator=torch.Generator().manual_seed(5 + case.seed))
        weight = inputs.place(draws.to(torch.int8))
        scale = inputs.tensor((f,), torch.float32, 0.01)
    else:
        weight = inputs.tensor((f, c), kind)
    bias = inputs.tensor((f,), case.dtype) if o.get("bias") else None
    with torch.no_grad():
        return {"y": fn(x, weight, bias, scale=scale)}


def _kinds(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    yield {}
    yield {"weight": torch.int8}
    if dtype == torch.float32:
        yield {"weight": torch.bfloat16}
        yield {"weight": torch.float16}


def _bases(dtype: torch.dtype) -> Iterator[Variant]:
    for kind in _kinds(dtype):
        yield (3, 40, 9), {"bias": True, **kind}


def _variants(dtype: torch.dtype) -> Iterator[Variant]:
    for kind in _kinds(dtype):
        for n in ROWS:
            yield (n, 64, 8), kind  # whole vectors and tiles
            for bias in (False, True):
                yield (n, 97, 10), {**kind, "bias": bias}
        for shape in ((1, 1, 1), (1, 5, 3), (9, 1, 5), (7, 528, 67), (8, 1100, 7), (1, 2048, 64), (0, 4, 3), (3, 4, 0)):
            yield shape, kind
        for extreme in ({"mean": 100.0}, {"scale": 1e-3}, {"scale": 50.0}):
            yield (2, 130, 11), {**kind, **extreme}


SUBJECT = Subject(run_linear, ops.linear, linear_torch, linear_ref, _bases, _variants, MATRIX_LAYOUTS, ("contiguous",))
