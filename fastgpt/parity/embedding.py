"""Parity of embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastgpt import ops
from fastgpt.ops.embedding import embedding_ref
from fastgpt.parity._positions import rows
from fastgpt.parity.inputs import Inputs
from fastgpt.parity.rule import Case, Outputs, Subject, Variant


def run_embedding(case: Case, fn: Callable[..., Any], inputs: Inputs) -> Outputs:
    """Run `fn` and return the rows and the gradients of the tables. Shape: V, T_max (0: no positions), C, then ids."""
    v, p, c, *shape = case.shape
    o = dict(case.options)
    ids = torch.randint(v, shape, generator=torch.Generator().manual_seed(3))
    ids = ids // o.get("distinct", 1) * o.get("distinct", 1)
    ids = inputs.place(ids.int() if o.get("int32") else ids)
    weight = inputs.leaf((v, c), case.dtype)
    position_weight = inputs.leaf((p, c), case.dtype) if p else None
    positions = rows(inputs, p, tuple(shape), o.get("positions"))
    y = fn(ids, weight, position_weight, positions=positions, padding_idx=o.get("padding_idx"))
    y.backward(inputs.grad(tuple(y.shape), case.dtype, o.get("scale", 1.0), o.get("mean", 0.0)))
    leaves = {"dweight": weight, "dposition_weight": position_weight}
    return {"y": y, **{n: t.grad for n, t in leaves.items() if t is not None and t.grad is not None}}


def _bases(dtype: torch.dtype) -> Iterator[Variant]:
    yield (11, 7, 33, 3, 5), {}
    yield (11, 7, 33, 3, 5), {"positions": "own"}
    yield (11, 7, 64, 3, 5), {}  # 16-byte accesses where the layout allows them


def _variants(dtype: torch.dtype) -> Iterator[Variant]:
    for shape in (
        (1, 1, 1, 1, 1),
        (1, 5, 1, 3, 5),
        (9, 5, 1, 3, 5),
        (500, 70, 128, 3, 67),
        (9, 5, 770, 2, 5),
        (5, 4, 2100, 2, 3),
        (7, 3, 16, 0, 3),
    ):
        yield shape, {}
        yield (shape[0], 0, *shape[2:]), {}
    others: tuple[tuple[int, ...], ...] = ((7, 3, 16, 2, 0), (12, 6, 8, 6), (12, 6, 8, 2, 3, 4), (12, 0, 8))
    for other in others:
        yield other, {}
    for o in ({"positions": "shared"}, {"positions": "own"}, {"int32": True}, {"distinct": 50}, {"padding_idx": 7}):
        yield (50, 9, 20, 9, 9), {**o}
    yield (3, 2, 40, 300, 2), {}  # many tokens on each row
    yield (2, 1, 8, 600, 1), {}
    yield (1, 0, 8, 1500), {}
    yield (3, 2, 40, 300, 2), {"positions": "own", "mean": 100.0}
    yield (2, 1, 8, 600, 1), {"padding_idx": -1, "int32": True}
    yield (11, 7, 33, 3, 5), {"scale": 1e4 if dtype != torch.float16 else 1e3}


SUBJECT = Subject(run_embedding, ops.embedding, embedding_ref, embedding_ref, _bases, _variants)
