"""Parity of cross_entropy: loss and gradient of the logits, out of place and in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.ops.cross_entropy import cross_entropy_ref, cross_entropy_torch
from fastgpt.parity.inputs import Inputs
from fastgpt.parity.rule import MATRIX_LAYOUTS, VECTOR_LAYOUTS, Case, Outputs, Subject, Variant

INPLACE_LAYOUTS = ("contiguous", "sliced", "rows", "misaligned")


def run_cross_entropy(case: Case, fn: Callable[..., Any], inputs: Inputs) -> Outputs:
    """Run `fn` and return the loss and the gradient of the logits.

    Targets include the first and the last class; every third row has none.
    """
    o = dict(case.options)
    n, columns = case.shape
    k = o.get("vocab_size", columns)
    logits = inputs.leaf(case.shape, case.dtype, o.pop("scale", 1.0), o.pop("mean", 0.0))
    target = torch.randint(0, k, (n,), generator=torch.Generator().manual_seed(7))
    target[:1], target[-1:] = k - 1, 0
    target[2::3] = o.get("ignore_index", -100)
    if o.pop("weighted", False):
        o["weight"] = inputs.place(inputs.tensor((k,), torch.float32).abs() + 0.1)
    values, target = logits, inputs.place(target)
    if o.pop("inplace", False) and not inputs.wide:
        layout = case.layout if case.layout in INPLACE_LAYOUTS else "sliced"  # contiguous rows that do not overlap
        values = inputs.place(torch.zeros_like(logits), layout, written=True).copy_(logits)
        o["inplace"] = True
    loss = fn(values, target, **o)
    loss.backward(inputs.grad(tuple(loss.shape), torch.float32).to(loss.dtype) if loss.dim() else None)
    assert logits.grad is not None
    return {"loss": loss, "dlogits": logits.grad}


def _torch_cross_entropy(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    options.pop("inplace", None)
    names = ("weight", "ignore_index", "label_smoothing", "z_loss", "softcap", "vocab_size", "reduction")
    defaults = (None, -100, 0.0, 0.0, 0.0, None, "mean")
    return cross_entropy_torch(logits, target, {n: options.get(n, d) for n, d in zip(names, defaults)})


def _bases(dtype: torch.dtype) -> Iterator[Variant]:
    yield (7, 61), {"reduction": "none"}
    yield (7, 61), {"reduction": "none", "inplace": True}
    # 16-byte accesses where the layout allows them
    yield (7, 64), {"reduction": "none", "inplace": True}


def _variants(dtype: torch.dtype) -> Iterator[Variant]:
    for shape in ((1, 1), (1, 2), (3, 1000), (2, 50257), (0, 16)):
        for inplace in (False, True):
            yield shape, {"reduction": "sum", "inplace": inplace}
    for classes in (1, 2):
        for o in ({}, {"z_loss": 1e-2}, {"label_smoothing": 0.1, "z_loss": 1e-2, "weighted": True, "softcap": 4.0}):
            yield (33, classes), {"reduction": "none", **o}
    # rows that are held while their gradient is computed: GPT-2's padded vocabulary in 16 bits, half of it in fp32
    padded = ((4, 50304), 50257) if dtype != torch.float32 else ((4, 9008), 9001)
    for reduction, z_loss in (("none", 0.0), ("sum", 1e-2)):
        yield padded[0], {"reduction": reduction, "z_loss": z_loss, "vocab_size": padded[1], "inplace": True}
    single: list[dict[str, Any]] = [
        {"reduction": "none"},
        {"reduction": "sum"},
        {"label_smoothing": 0.1},
        {"z_loss": 1e-2},
        {"softcap": 4.0},
        {"weighted": True},
        {"ignore_index": 3},
        {"vocab_size": 40},
    ]
    pairs = [{**a, **b} for i, a in enumerate(single) for b in single[i + 1 :]]
    everything = {k: v for o in single[2:] for k, v in o.items()}
    for o in (*single, *pairs, everything, {"mean": 1e4}, {"scale": 1e4}):
        for inplace in (False, True):
            yield (7, 61), {**o, "inplace": inplace}


SUBJECT = Subject(
    run_cross_entropy,
    ops.cross_entropy,
    _torch_cross_entropy,
    cross_entropy_ref,
    _bases,
    _variants,
    MATRIX_LAYOUTS,
    VECTOR_LAYOUTS,
)
