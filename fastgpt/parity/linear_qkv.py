"""Parity of linear_qkv."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastgpt import ops
from fastgpt.ops.linear_qkv import linear_qkv_ref, linear_qkv_torch
from fastgpt.parity.inputs import Inputs
from fastgpt.parity.rule import MATRIX_LAYOUTS, Case, Outputs, Subject, Variant


def run_linear_qkv(case: Case, fn: Callable[..., Any], inputs: Inputs) -> Outputs:
    """Run `fn` and return its outputs and gradients; shape: N, C, columns of q, columns of k."""
    o = dict(case.options)
    n, c, q, kv = case.shape
    x = inputs.leaf((n, c), case.dtype, o.get("scale", 1.0), o.get("mean", 0.0))
    weight = inputs.leaf((q + 2 * kv, c), case.dtype, c**-0.5 if c else 1.0)
    bias = inputs.leaf((q + 2 * kv,), case.dtype) if o.get("bias", True) else None
    outputs = fn(x, weight, bias, n_kv=kv)
    torch.autograd.backward(outputs, [inputs.grad((n, size), case.dtype) for size in (q, kv, kv)])
    grads = {"dx": x.grad, "dweight": weight.grad} | ({} if bias is None else {"dbias": bias.grad})
    return dict(zip("qkv", outputs)) | grads


def _bases(dtype: torch.dtype) -> Iterator[Variant]:
    yield (5, 16, 24, 8), {}
    yield (5, 16, 24, 8), {"bias": False}


def _variants(dtype: torch.dtype) -> Iterator[Variant]:
    for shape in ((1, 1, 1, 1), (70, 80, 128, 64), (3, 130, 70, 40), (129, 66, 64, 64), (0, 4, 8, 4), (3, 4, 8, 0)):
        yield shape, {}
    for n in (1, 2, 3, 4, 5, 7, 8, 13, 16, 31, 32, 48, 63, 64, 65):
        for widths in ((24, 16, 16), (17, 31, 5), (16, 48, 16), (33, 16, 1), (9, 0, 8)):
            yield (n, *widths), {}
    for n, c, q, kv in ((66, 64, 64, 64), (7, 33, 40, 17), (5, 40, 65, 33)):
        for o in ({"bias": False}, {"scale": 30.0}, {"mean": 100.0}, {"scale": 1e-3}):
            yield (n, c, q, kv), o


SUBJECT = Subject(
    run_linear_qkv,
    ops.linear_qkv,
    linear_qkv_torch,
    linear_qkv_ref,
    _bases,
    _variants,
    MATRIX_LAYOUTS,
    MATRIX_LAYOUTS,
)
