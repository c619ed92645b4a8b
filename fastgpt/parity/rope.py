"""Parity of rope and rope_qkv."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastgpt import ops
from fastgpt.ops.rope import rope_qkv_ref, rope_ref
from fastgpt.parity._positions import rows
from fastgpt.parity.inputs import Inputs
from fastgpt.parity.rule import REPEATED, Case, Outputs, Subject, Variant


def _either(plain: Callable[..., Any], packed: Callable[..., Any]) -> Callable[..., Any]:
    """Return one callable for both forms; only the packed form receives numbers of heads."""
    return lambda *args, **options: (packed if "n_heads" in options else plain)(*args, **options)


def run_rope(case: Case, fn: Callable[..., Any], inputs: Inputs) -> Outputs:
    """Run `fn` and return q and k rotated, and their gradients; packed: the same of one tensor.

    Shape: B, T, H, Hkv, D, rotary_dim / 2.
    """
    b, t, h, g, d, half = case.shape
    o = dict(case.options)
    packed, scale = o.pop("packed", False), o.pop("scale", 1.0)
    o["positions"] = rows(inputs, t + 3, (b, t), o.get("positions"))
    cos, sin = (inputs.tensor((t + 3, half), torch.float32) for _ in range(2))
    if packed:
        leaf = inputs.leaf((b, t, h + 2 * g, d), case.dtype, scale)
        layout = "sliced" if case.layout in REPEATED else case.layout
        qkv = leaf  # for the reference; kernels get a tensor that they may overwrite, not a leaf
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


def _bases(dtype: torch.dtype) -> Iterator[Variant]:
    yield (2, 5, 3, 2, 14, 5), {}
    yield (2, 5, 3, 2, 14, 5), {"packed": True, "interleaved": True}
    yield (2, 5, 3, 2, 32, 16), {}  # 16-byte accesses where the layout allows them
    yield (2, 5, 3, 2, 32, 8), {"packed": True, "interleaved": True}


def _variants(dtype: torch.dtype) -> Iterator[Variant]:
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


_reference = _either(rope_ref, rope_qkv_ref)
SUBJECT = Subject(run_rope, _either(ops.rope, ops.rope_qkv), _reference, _reference, _bases, _variants)
