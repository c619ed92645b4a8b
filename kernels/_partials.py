"""Sums of partials: the second step of gradients of parameters, which are sums over rows.

Each program of a backward kernel sums its rows in fp32 and writes one row of partials; the kernel here adds these in a
fixed order. There are no atomics, so results are bitwise deterministic. It replaces torch.sum because it adds up to
three gradients and rounds them to the parameters' dtypes in one launch instead of two for each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._runtime import Configuration, cast, interpreted, jit_kernel, pointers, split_meta


@jit_kernel(do_not_specialize=["P"])
def add_partials_kernel(
    partials_ptr,  # (P, sums, C)
    first_ptr,  # (C) or None
    second_ptr,  # (C) or None
    third_ptr,  # (C) or None
    P, C, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add BLOCK columns of partials over P in a fixed order, one sum per program along axis 1."""
    which, sums = tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, P, ROWS):
        p = (start + tl.arange(0, ROWS)[:, None]).to(tl.int64)  # (ROWS, 1)
        acc += tl.load(partials_ptr + (sums * p + which) * C + c, (p < P) & (c < C), other=0.0)
    total = tl.sum(acc, axis=0, keep_dims=True)
    # not `(c < C) & (which == 0)`: the interpreter turns a scalar condition into an integer mask, refused by Triton 3.9
    if which == 0:
        if first_ptr is not None:
            tl.store(first_ptr + c, cast(total, first_ptr.dtype.element_ty), c < C)
    elif which == 1:
        if second_ptr is not None:
            tl.store(second_ptr + c, cast(total, second_ptr.dtype.element_ty), c < C)
    elif third_ptr is not None:
        tl.store(third_ptr + c, cast(total, third_ptr.dtype.element_ty), c < C)


def _meta() -> dict[str, int]:
    """Return the launch shape."""
    return {"ROWS": 8, "BLOCK": 8192, "num_warps": 4} if interpreted() else {"ROWS": 256, "BLOCK": 16, "num_warps": 8}


def add_partials(partials: Tensor, *sums: Tensor | None) -> None:
    """Add partials (P, sums, C) over P into each of up to three sums (C); None drops one."""
    P, n_sums, C = partials.shape
    outs = [*sums[:n_sums], None, None][:3]
    meta = _meta()
    add_partials_kernel[(triton.cdiv(C, meta["BLOCK"]), n_sums)](partials, *outs, P, C, **meta)


def add_partials_configuration(case: str, *sums: torch.dtype | None) -> Configuration:
    """Return the launch shape for up to three sums of these dtypes."""
    meta, warps = split_meta(_meta())
    outs = dict(zip(("first_ptr", "second_ptr", "third_ptr"), (*sums, None, None)))
    types = pointers(partials_ptr=torch.float32, **outs)
    return Configuration(add_partials_kernel, f"any C, {case}", {**types, "P": "i32", "C": "i32"}, warps, meta)
