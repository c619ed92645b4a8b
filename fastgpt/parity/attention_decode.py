"""Parity of attention_decode. The baselines are those of attention with causal order (parity/attention.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.ops.attention_decode import attention_decode_ref, gather_pages
from fastgpt.parity.attention import DEFAULTS, baseline
from fastgpt.parity.inputs import Inputs
from fastgpt.parity.rule import Case, Outputs, Subject, Variant


def run_attention_decode(case: Case, fn: Callable[..., Tensor], inputs: Inputs) -> Outputs:
    """Run `fn` and return its output; shape: B, T, S, H, Hkv, D. With the option `page`, rows of at least S keys lie in
    pages of so many slots."""
    b, t, s, h, g, d = case.shape
    o = dict(case.options)
    spread = o.pop("spread", 1.0)
    if o.pop("lens", False):  # all keys, half of them, at most one
        o["kv_lens"] = inputs.place((s - s // 2 * (torch.arange(b) % 3)).int())
    if o.pop("start", False):
        o["kv_start"] = inputs.place((torch.arange(b) % 3 * 2 + 1).clamp(max=s))
    q, keys = inputs.tensor((b, t, h, d), case.dtype, spread), (b, s)
    if page := o.pop("page", 0):
        of_row = -(-s // page)
        keys = (b * of_row + 1, page)
        o["pages"] = inputs.place((torch.arange(b * of_row).flip(0) + 1).view(b, of_row).int())
    return {"out": fn(q, *(inputs.tensor((*keys, g, d), case.dtype, spread) for _ in "kv"), **o)}


def _torch(q: Tensor, k: Tensor, v: Tensor, pages: Tensor | None = None, **o: Any) -> Tensor:
    if pages is not None:
        k, v = gather_pages(k, pages), gather_pages(v, pages)
    return baseline(q, k, v, {**DEFAULTS, "causal": True, **o})


def _reference(q: Tensor, k: Tensor, v: Tensor, **o: Any) -> Tensor:
    none: dict[str, Any] = {"kv_lens": None, "kv_start": None, "window": None, "softcap": 0.0, "scale": None}
    return attention_decode_ref(q, k, v, **{**none, **o})


SINGLE: tuple[dict[str, Any], ...] = ({"lens": True}, {"start": True}, {"window": 4}, {"softcap": 2.0}, {"scale": 0.3})


def _bases(dtype: torch.dtype) -> Iterator[Variant]:
    yield (2, 1, 11, 4, 2, 16), {"lens": True}
    yield (2, 3, 11, 2, 1, 16), {}
    yield (2, 1, 20, 4, 2, 16), {"lens": True, "page": 8}


def _variants(dtype: torch.dtype) -> Iterator[Variant]:
    pairs = [{**a, **b} for i, a in enumerate(SINGLE) for b in SINGLE[i + 1 :]]
    everything: dict[str, Any] = {"lens": True, "start": True, "window": 7, "softcap": 2.0, "scale": -0.3}
    for o in ({}, *SINGLE, *pairs, everything):  # eight heads: with few queries the largest error depends on luck
        yield (3, 1, 23, 8, 1, 16), o
    for o in (*SINGLE, everything):
        yield (3, 3, 23, 4, 1, 16), o
    for page in (8, 16, 64, 256):
        yield (2, 1, 70, 8, 1, 16), {"page": page, "start": True}
        yield (2, 3, 300, 4, 2, 20), {**everything, "page": page, "window": 90}
    yield (1, 1, 600, 8, 1, 64), {"page": 32}
    yield (1, 1, 70, 8, 1, 256), {"page": 16}
    yield (0, 1, 8, 2, 1, 16), {"page": 8}
    yield (2, 1, 0, 2, 1, 16), {"page": 8}
    for d in (1, 20, 40, 64, 80, 96, 128, 256):
        yield (4 if d < 64 else 2, 1, 60, 1, 1, d), {}
        yield (1, 1, 60, 8, 1, d), {}
    for d in (64, 256):  # several tiles of keys in each split
        yield (1, 1, 600, 2, 1, d), {}
        yield (2, 2, 600, 2, 1, d), {**everything, "window": 500}
    for s in (1, 2, 63, 64, 65, 129, 512, 513, 1030):
        yield (1, 1, s, 8, 1, 16), {}
    for t, h, g in ((8, 1, 1), (1, 9, 1), (5, 8, 2), (8, 12, 1), (2, 3, 3)):  # rows that share a key head: 1 to 96
        yield (2, t, 70, h, g, 32), {"lens": True}
    for shape in ((0, 1, 5, 2, 1, 16), (2, 0, 5, 2, 1, 16), (2, 1, 0, 2, 1, 16), (1, 5, 3, 2, 1, 16)):
        yield shape, {}
    for spread in (1e-3, 2.0 if dtype == torch.float32 else 30.0):  # 30: |z| of 1000
        yield (1, 1, 70, 8, 1, 16), {"spread": spread}


SUBJECT = Subject(
    run_attention_decode, ops.attention_decode, _torch, _reference, _bases, _variants, grad_layouts=("contiguous",)
)
