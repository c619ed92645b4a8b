"""Cases of parity for the forward kernel of attention for sm_90a; shapes are (B, T, S, H, Hkv, D)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastgpt.parity import Case

BF16, F16 = torch.bfloat16, torch.float16
SHAPES: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((1, 300, 300, 4, 2, 64), {"causal": True}),
    ((1, 200, 250, 2, 1, 64), {"causal": True}),  # the diagonal crosses two tiles of keys
    ((1, 300, 300, 2, 1, 128), {"causal": True, "return_lse": True}),
    ((2, 130, 260, 2, 2, 128), {}),
    ((1, 129, 513, 1, 1, 64), {"causal": True}),  # more keys than queries
    ((1, 200, 70, 2, 1, 128), {"causal": True}),  # queries without keys
    ((1, 1, 128, 2, 1, 64), {"scale": 0.3}),
    ((1, 64, 1, 1, 1, 64), {}),
    ((1, 65, 65, 4, 2, 64), {"causal": True, "packed": True}),
    ((1, 5, 0, 2, 1, 64), {}),
    ((0, 5, 5, 2, 1, 64), {}),
)
LAYOUTS = ("transposed", "sliced", "rows", "expanded", "misaligned")


def quick() -> Iterator[Case]:
    """Return cases of every shape in one dtype, and of every layout."""
    for i, (shape, options) in enumerate(SHAPES):
        yield Case("attention", (BF16, F16)[i % 2], "contiguous", shape, tuple(options.items()))
    for layout in LAYOUTS:
        yield Case("attention", BF16, layout, (2, 33, 33, 2, 2, 64), (("causal", True),))
