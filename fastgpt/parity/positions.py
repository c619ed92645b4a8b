"""Parity of rope, rope_qkv and embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.ops.embedding import embedding_ref
from fastgpt.ops.rope import rope_qkv_ref, rope_ref
from fastgpt.parity.inputs import Inputs
from fastgpt.parity.rule import REPEATED, Case, Outputs, Subject, Variant


def _either(plain: Callable[..., Any], packed: Callable[..., Any]) -> Callable[..., Any]:
    """One callable for both forms: the packed one is told its numbers of heads."""
    return lambda *args, **options: (packed if "n_heads" in options else plain)(*args, **options)


def _rows(case: Case, inputs: Inputs, top: int, shape: tuple[int, ...], kind: str | None) -> Tensor | None:
    """Explicit positions in [0, top): one row for all sequences ('shared'), one for each ('own'), or None."""
    if kind is None:
        return None
    g = torch.Generator().manual_seed(5)
    return inputs.place(torch.randint(top, shape[-1:] if kind == "shared" else shape, generator=g))


def run_rope(case: Case, fn: Callable[..., Any], inputs: Inputs) -> Outputs:
    """q and k turned, and their gradients; packed: of one tensor. Shape: B, T, H, Hkv, D, rotary_dim / 2."""
    b, t, h, g, d, half = case.shape
    o = dict(case.options)
    packed, scale = o.pop("packed", False), o.pop("scale", 1.0)
    o["positions"] = _rows(case, inputs, t + 3, (b, t), o.get("positions"))
    cos, sin = (inputs.tensor((t + 3, half), torch.float32) for _ in range(2))
    if packed:
        leaf = inputs.leaf((b, t, h + 2 * g, d), case.dtype, scale)
        layout = "sliced" if case.layout in REPEATED else case.layout
        qkv = leaf  # the reference's; kernels get what they may overwrite: not a leaf
        if not inputs.wide:
            qkv = inputs.place(torch.zeros_like(leaf), layout, written=True).copy_(leaf)
        out = fn(qkv, cos, sin, n_heads=h, n_kv_heads=g, **o)
        out.backward(inputs.grad(tuple(out.shape), case.dtype))
        assert leaf.grad is not None
        return {"qkv": out, "dqkv": leaf.grad}
    q, k = inputs.leaf((b, t, h, d), case.dtype, scale), inputs.leaf((b, t, g, d), case.dtype, scale)
    turned = fn(q, k, cos, sin, **o)
    torch.autograd.backward(turned, [inputs.grad(tuple(x.shape), case.dtype) for x in turned])
    assert q.grad is not None and k.grad is not None
    return {"q": turned[0], "k": turned[1], "dq": q.grad, "dk": k.grad}


def run_embedding(case: Case, fn: Callable[..., Any], inputs: Inputs) -> Outputs:
    """Rows and the tables' gradients. Shape: V, T_max (0: no position rows), C, then that of ids."""
    v, p, c, *shape = case.shape
    o = dict(case.options)
    ids = torch.randint(v, shape, generator=torch.Generator().manual_seed(3))
    ids = ids // o.get("distinct", 1) * o.get("distinct", 1)
    ids = inputs.place(ids.int() if o.get("int32") else ids)
    weight = inputs.leaf((v, c), case.dtype)
    position_weight = inputs.leaf((p, c), case.dtype) if p else None
    positions = _rows(case, inputs, p, tuple(shape), o.get("positions"))
    y = fn(ids, weight, position_weight, positions=positions, padding_idx=o.get("padding_idx"))
    y.backward(inputs.grad(tuple(y.shape), case.dtype, o.get("scale", 1.0), o.get("mean", 0.0)))
    leaves = {"dweight": weight, "dposition_weight": position_weight}
    return {"y": y, **{n: t.grad for n, t in leaves.items() if t is not None and t.grad is not None}}


def _rope_bases(dtype: torch.dtype) -> Iterator[Variant]:
    yield (2, 5, 3, 2, 14, 5), {}
    yield (2, 5, 3, 2, 14, 5), {"packed": True, "interleaved": True}
    yield (2, 5, 3, 2, 32, 16), {}  # in 16-byte pieces where the layout allows
    yield (2, 5, 3, 2, 32, 8), {"packed": True, "interleaved": True}


def _rope_variants(dtype: torch.dtype) -> Iterator[Variant]:
    shapes = (
        (1, 1, 1, 1, 2, 1),
        (1, 5, 1, 1, 2, 1),
        (2, 33, 4, 1, 64, 32),
        (1, 3, 2, 2, 33, 16),
        (1, 4, 2, 1, 33, 4),
        (3, 7, 5, 5, 80, 40),
    )
    wide = (
        (1, 2, 3, 1, 256, 128),
        (1, 2, 1, 1, 1100, 300),
        (1, 2, 5, 1, 602, 299),
        (1, 2, 1, 1, 20, 0),
        (0, 3, 2, 1, 8, 4),
        (2, 0, 2, 1, 8, 4),
    )
    for shape in (*shapes, *wide):
        for interleaved in (False, True):
            yield shape, {"interleaved": interleaved}
            yield shape, {"interleaved": interleaved, "packed": True}
    for packed in (False, True):
        for interleaved in (False, True):
            for positions in ("shared", "own"):
                o = {"positions": positions, "interleaved": interleaved, "packed": packed}
                yield (3, 9, 2, 1, 24, 12), o
        yield (2, 9, 2, 1, 24, 12), {"scale": 1e4 if dtype != torch.float16 else 1e3, "packed": packed}


def _embedding_bases(dtype: torch.dtype) -> Iterator[Variant]:
    yield (11, 7, 33, 3, 5), {}
    yield (11, 7, 33, 3, 5), {"positions": "own"}
    yield (11, 7, 64, 3, 5), {}  # in 16-byte pieces where the layout allows


def _embedding_variants(dtype: torch.dtype) -> Iterator[Variant]:
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
    yield (3, 2, 40, 300, 2), {}  # many tokens a row
    yield (2, 1, 8, 600, 1), {}
    yield (1, 0, 8, 1500), {}
    yield (3, 2, 40, 300, 2), {"positions": "own", "mean": 100.0}
    yield (2, 1, 8, 600, 1), {"padding_idx": -1, "int32": True}
    yield (11, 7, 33, 3, 5), {"scale": 1e4 if dtype != torch.float16 else 1e3}


SUBJECTS = {
    "rope": Subject(
        run_rope,
        _either(ops.rope, ops.rope_qkv),
        _either(rope_ref, rope_qkv_ref),
        _either(rope_ref, rope_qkv_ref),
        _rope_bases,
        _rope_variants,
    ),
    "embedding": Subject(
        run_embedding, ops.embedding, embedding_ref, embedding_ref, _embedding_bases, _embedding_variants
    ),
}
