"""Parity of linear_cross_entropy: loss and gradients, in one piece and in chunks that do not divide the rows.

The baseline is F.cross_entropy of the logits of F.linear in that dtype, cast to fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.ops._upstream import expected_gradient
from fastgpt.ops.linear_cross_entropy import linear_cross_entropy_ref, linear_cross_entropy_torch
from fastgpt.parity.inputs import Inputs
from fastgpt.parity.rule import MATRIX_LAYOUTS, VECTOR_LAYOUTS, Case, Outputs, Subject, Variant

SINGLE: tuple[dict[str, Any], ...] = (
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"softcap": 4.0},
    {"weighted": True},
    {"ignore_index": 3},
    {"vocab_size": 40},
    {"bias": True},
)


def run_linear_cross_entropy(case: Case, fn: Callable[..., Any], inputs: Inputs) -> Outputs:
    """Run `fn` and return the loss and the gradients; shape: N, C, V.

    Targets include the first and the last class; every third row has none.
    """
    o = dict(case.options)
    n, c, v = case.shape
    k = o.get("vocab_size", v)
    x = inputs.leaf((n, c), case.dtype, o.pop("scale", 1.0))
    w = inputs.leaf((v, c), case.dtype, c**-0.5)  # logits around 1
    mean = o.pop("mean", 0.0)
    b = inputs.leaf((v,), case.dtype, 1.0, mean) if o.pop("bias", False) else None
    target = torch.randint(0, k, (n,), generator=torch.Generator().manual_seed(7))
    target[:1], target[-1:] = k - 1, 0
    target[2::3] = o.get("ignore_index", -100)
    if o.pop("weighted", False):
        o["weight"] = inputs.place(inputs.tensor((k,), torch.float32).abs() + 0.1)
    target = inputs.place(target)
    announced = o.pop("announced", False)
    share = torch.full((1,), 0.7, dtype=torch.float64 if inputs.wide else torch.float32, device=target.device)
    with expected_gradient(share) if announced and not inputs.wide else nullcontext():
        loss = fn(x, w, target, linear_bias=b, **o)
    upstream = inputs.grad(tuple(loss.shape), torch.float32) if loss.dim() else share.view(())
    loss.backward(upstream.to(loss.dtype))
    return {"loss": loss, **{n: t.grad for n, t in (("dx", x), ("dweight", w), ("dbias", b)) if t is not None}}  # type: ignore[misc]


def _torch(x: Tensor, w: Tensor, target: Tensor, *, linear_bias: Tensor | None, **options: Any) -> Tensor:
    options.pop("chunk", None)
    names = ("weight", "ignore_index", "label_smoothing", "z_loss", "softcap", "vocab_size", "reduction")
    defaults = (None, -100, 0.0, 0.0, 0.0, None, "mean")
    return linear_cross_entropy_torch(
        x, w, target, linear_bias, {n: options.get(n, d) for n, d in zip(names, defaults)}
    )


def _reference(x: Tensor, w: Tensor, target: Tensor, *, chunk: int = 0, **options: Any) -> Tensor:
    return linear_cross_entropy_ref(x, w, target, **options)


def _bases(dtype: torch.dtype) -> Iterator[Variant]:
    for chunk in (13, 5):
        yield (13, 16, 61), {"bias": True, "chunk": chunk, "reduction": "none"}


def _variants(dtype: torch.dtype) -> Iterator[Variant]:
    pairs = [{**a, **b} for i, a in enumerate(SINGLE) for b in SINGLE[i + 1 :]]
    everything = {k: v for o in SINGLE for k, v in o.items()}
    ways = [{"reduction": r, "chunk": chunk} for r in ("mean", "sum", "none") for chunk in (13, 5)]
    for i, o in enumerate(({}, *SINGLE, everything, *pairs)):
        all_ways = dtype == torch.float32 or i <= len(SINGLE) + 1  # for pairs in 16 bits one way each
        for way in ways if all_ways else [ways[i % 6]]:
            yield (13, 16, 61), {**o, **way}
    for shape in ((1, 1, 1), (1, 5, 2), (3, 40, 1000), (2, 8, 50257), (5, 1, 7), (0, 4, 16)):
        for chunk in ("auto", 2):
            yield shape, {"reduction": "sum", "chunk": chunk}
    for o in ({}, everything):
        for way in ways[:4]:
            yield (13, 16, 61), {**o, **way, "announced": True}
    for shape in ((33, 3, 1), (33, 1, 2)):
        for o in ({}, {"label_smoothing": 0.1, "z_loss": 1e-2}):
            yield shape, {"reduction": "none", "chunk": 13, **o}
    for extreme in ({"scale": 5e3}, {"bias": True, "mean": 1e4}, {"scale": 1e-3}):
        for reduction in ("mean", "none"):
            for chunk in (13, 5):
                yield (13, 16, 61), {**extreme, "reduction": reduction, "chunk": chunk}


SUBJECT = Subject(
    run_linear_cross_entropy,
    ops.linear_cross_entropy,
    _torch,
    _reference,
    _bases,
    _variants,
    MATRIX_LAYOUTS,
    VECTOR_LAYOUTS,
)
