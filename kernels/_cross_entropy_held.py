"""Cross-entropy without options over rows that stay in registers: loss, and the gradient written over the logits.

    m = max z, s = sum exp(z - m), l = m + log s - z_y + z_loss (m + log s)^2
    dl/dz_c = exp(z_c - m) (1 + 2 z_loss (m + log s)) / s - [c = y]

One program holds one row, in 16 bits, and uses it three times: for m, for s and for the gradient. So fwd_bwd reads and
writes a logit once, whatever L2 holds. A program of 16 warps takes all registers of a multiprocessor, 128 a thread.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._runtime import Configuration, cast, exp, jit_kernel, log, pointers, split_meta

PARTS = ((16384, 8192, 8192), (32768, 16384, 2048))  # columns of the three parts of a row


@triton.jit
def _held_sum(x, shift):
    """Return the sum of exp(x - shift) of a part of a row."""
    return tl.sum(exp(x.to(tl.float32) - shift), axis=0)


@triton.jit
def _held_gradient(x, shift, factor, dtype: tl.constexpr):
    """Return the gradient of a part of a row, without the term of the target."""
    return cast(exp(x.to(tl.float32) - shift) * factor, dtype)


@jit_kernel(do_not_specialize=["ignore_index", "z_loss", "scale_step"])
def cross_entropy_held_kernel(
    logits_ptr,  # (N, V), rows logits_row apart; overwritten by the gradient
    loss_ptr,  # (N) fp32
    target_ptr,  # (N) int64
    scale_ptr,  # fp32, scale_step apart
    scale_step, logits_row, K, V, ignore_index, z_loss, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
):  # fmt: skip
    """Do the work of cross_entropy_fwd_bwd_kernel without options on one row per program, which is read once.

    The row stays in registers in three parts of B0, B1 and B2 columns, with B0 + B1 <= K and V <= B0 + B1 + B2.
    """
    row = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)  # (1): the interpreter takes no scalar as a mask
    logits_ptr += tl.program_id(0).to(tl.int64) * logits_row
    dtype = logits_ptr.dtype.element_ty
    y = tl.load(target_ptr + row)
    ignored = y == ignore_index
    valid = (y >= 0) & (y < K) & (ignored == 0)  # else the row is not read
    z_y = tl.load(logits_ptr + y, valid, other=0.0).to(tl.float32)
    c2 = B0 + B1 + tl.arange(0, B2)
    x0 = tl.load(logits_ptr + tl.arange(0, B0), valid, other=0.0)
    x1 = tl.load(logits_ptr + B0 + tl.arange(0, B1), valid, other=0.0)
    x2 = tl.load(logits_ptr + c2, valid & (c2 < V), other=0.0)
    x2 = tl.where(c2 < K, x2.to(tl.float32), float("-inf"))
    m = tl.maximum(tl.max(x0, axis=0), tl.maximum(tl.max(x1, axis=0), tl.max(x2, axis=0))).to(tl.float32)
    shift = tl.where(m == float("-inf"), 0.0, m)
    s = _held_sum(x0, shift) + _held_sum(x1, shift) + _held_sum(x2, shift)
    lse = m + log(s)
    loss = (m - z_y) + log(s) + z_loss * lse * lse
    tl.store(loss_ptr + row, tl.where(ignored, 0.0, tl.where(valid, loss, float("nan"))))
    scale = tl.load(scale_ptr + row * scale_step)
    factor = tl.where(valid, scale * (1.0 + 2.0 * z_loss * lse) / s, 0.0)
    tl.debug_barrier()  # every thread must have read z_y before it is overwritten
    tl.store(logits_ptr + tl.arange(0, B0), _held_gradient(x0, shift, factor, dtype))
    tl.store(logits_ptr + B0 + tl.arange(0, B1), _held_gradient(x1, shift, factor, dtype))
    tl.store(logits_ptr + c2, _held_gradient(x2, shift, factor, dtype), c2 < V)
    tl.debug_barrier()  # the term of the target is added last
    d_y = cast(exp(z_y - shift) * factor - scale, dtype)
    tl.store(logits_ptr + y, d_y, valid)


def held_meta(logits: Tensor, K: int) -> dict[str, int] | None:
    """Return the launch shape for rows that are read once, or None where their parts would not fill the registers or
    not be read in pieces of 16 bytes."""
    V, step = logits.shape[1], logits.stride(0)
    if logits.element_size() != 2 or (V | step) % 16 or logits.data_ptr() % 16:
        return None
    fits = [parts for parts in PARTS if parts[0] + parts[1] <= K and V <= sum(parts)]
    return _meta(fits[0]) if fits else None


def _meta(parts: tuple[int, int, int]) -> dict[str, int]:
    return {**dict(zip(("B0", "B1", "B2"), parts)), "num_warps": 16}


def held_configurations(dtype: torch.dtype) -> Iterator[Configuration]:
    """Yield every launch shape."""
    for parts in PARTS if dtype.itemsize == 2 else ():
        meta, warps = split_meta(_meta(parts))
        types = pointers(logits_ptr=dtype, loss_ptr=torch.float32, target_ptr=torch.int64, scale_ptr=torch.float32)
        types |= dict.fromkeys(("scale_step", "logits_row", "K", "V", "ignore_index"), "i32") | {"z_loss": "fp32"}
        yield Configuration(
            cross_entropy_held_kernel, f"K={parts[0] + parts[1]} or more", types, warps, meta, aligned=True
        )
