"""Parity of linear_divergence: loss and the student's gradients, in chunks that do and do not divide the rows.

The baseline is PyTorch's: F.linear, log_softmax in that dtype's fp32 cast, and F.kl_div over whole logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.core.backend import KERNEL_DTYPES
from fastgpt.ops.linear_divergence import linear_divergence_ref
from fastgpt.parity.inputs import Inputs
from fastgpt.parity.rule import MATRIX_LAYOUTS, VECTOR_LAYOUTS, Case, Outputs, Subject, Variant

KINDS: tuple[dict[str, Any], ...] = ({}, {"kind": "reverse_kl"}, {"kind": "jsd", "beta": 0.3})


def run_linear_divergence(case: Case, fn: Callable[..., Any], inputs: Inputs) -> Outputs:
    """Run `fn` and return the loss and the gradients; shape: N, C, V. The teacher is half as wide and has 3 rows more;
    every third row does not count."""
    o = dict(case.options)
    n, c, v = case.shape
    scale = o.pop("scale", 1.0)
    x, x_t = inputs.leaf((n, c), case.dtype, scale), inputs.tensor((n, -(-c // 2)), case.dtype, scale)
    w = inputs.leaf((v, c), case.dtype, c**-0.5)  # logits around 1
    w_t = inputs.tensor((v + 3, -(-c // 2)), case.dtype, c**-0.5)
    bias, mean = o.pop("bias", False), o.pop("mean", 0.0)
    b = inputs.leaf((v,), case.dtype, 1.0, mean) if bias else None
    b_t = inputs.tensor((v + 3,), case.dtype, 1.0, mean) if bias else None
    if o.pop("masked", True):
        target = torch.zeros(n, dtype=torch.int64)
        target[2::3] = o.get("ignore_index", -100)
        o["target"] = inputs.place(target)
    o.setdefault("vocab_size", v)
    loss = fn(x, w, x_t, w_t, linear_bias=b, teacher_bias=b_t, **o)
    loss.backward(inputs.grad(tuple(loss.shape), torch.float32).to(loss.dtype))
    return {"loss": loss, **{n: t.grad for n, t in (("dx", x), ("dweight", w), ("dbias", b)) if t is not None}}  # type: ignore[misc]


def _torch(
    x: Tensor, w: Tensor, x_t: Tensor, w_t: Tensor, target: Tensor | None = None, *, linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None, kind: str = "forward_kl", beta: float = 0.5, temperature: float = 1.0,
    vocab_size: int = 0, ignore_index: int = -100, reduction: str = "mean", chunk: int = 0,
) -> Tensor:  # fmt: skip
    logits = F.linear(x, w, linear_bias), F.linear(x_t, w_t, teacher_bias)
    logq, logp = ((z[:, :vocab_size].float() / temperature).log_softmax(-1) for z in logits)

    def kl(log_of: Tensor, log_from: Tensor) -> Tensor:
        return F.kl_div(log_from, log_of, reduction="none", log_target=True).sum(-1)

    if kind == "jsd":
        logm = torch.logaddexp(logp + math.log(beta), logq + math.log1p(-beta))
        loss = beta * kl(logp, logm) + (1 - beta) * kl(logq, logm)
    else:
        loss = kl(logp, logq) if kind == "forward_kl" else kl(logq, logp)
    on = torch.ones_like(loss, dtype=torch.bool) if target is None else target != ignore_index
    loss = torch.where(on, loss, 0.0)
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.sum() / on.sum()


def _reference(*tensors: Tensor, chunk: int = 0, **options: Any) -> Tensor:
    return linear_divergence_ref(*tensors, **options)


def _bases(dtype: torch.dtype) -> Iterator[Variant]:
    kind = KINDS[KERNEL_DTYPES.index(dtype)]  # memory layouts do not depend on the kind
    yield (13, 16, 61), {"bias": True, "chunk": 13 if dtype == torch.float32 else 5, "reduction": "none", **kind}


def _variants(dtype: torch.dtype) -> Iterator[Variant]:
    single: tuple[dict[str, Any], ...] = (
        {"bias": True}, {"temperature": 1.75}, {"vocab_size": 40}, {"ignore_index": 3}, {"masked": False},
    )  # fmt: skip
    everything = {k: v for o in single for k, v in o.items()}
    reductions = ("mean", "sum", "none")
    for i, kind in enumerate(KINDS):
        for o in ({}, everything):
            for reduction in reductions:  # enough rows that the largest error of none is small by luck
                yield (61, 16, 61), {**kind, **o, "reduction": reduction, "chunk": 25}
        for j, o in enumerate(single):
            yield (61, 16, 61), {**kind, **o, "reduction": reductions[(i + j) % 3], "chunk": 25}
        for shape in ((33, 1, 2), (3, 40, 1000), (4, 8, 9001), (5, 1, 7), (0, 4, 16), (33, 8, 64)):
            # a sum is one number, whose error may be small by luck; in 16 bits these are many numbers
            yield shape, {**kind, "reduction": "none" if shape[2] in (2, 7, 9001) else "sum", "chunk": 13}
        for extreme in ({"scale": 50.0}, {"bias": True, "mean": 1e4}, {"scale": 1e-3}):
            yield (61, 16, 61), {**kind, **extreme, "reduction": "none", "chunk": 25}


SUBJECT = Subject(
    run_linear_divergence,
    ops.linear_divergence,
    _torch,
    _reference,
    _bases,
    _variants,
    MATRIX_LAYOUTS,
    VECTOR_LAYOUTS,
)
