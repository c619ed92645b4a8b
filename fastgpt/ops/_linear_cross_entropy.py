"""Raw ops of linear_cross_entropy: loss, or loss and all gradients, with one reused buffer of (chunk, V) logits.

    z = x W^T + b;  dx = dz W,  dW = dz^T x,  db = sum of dz's rows      (dz from fastgpt/ops/cross_entropy.py)

Each is one opaque op. torch.mm writes the products to buffers, and the raw cross-entropy op of the same backend
computes the loss and dz. dW and db are summed over the chunks in fp32 for every dtype. A product takes 2 N V C FLOP;
there is one in forward and there are two in backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt.core.device import in_huge_pages
from fastgpt.ops._common import define_driver, flop_formula
from fastgpt.ops.cross_entropy import CROSS_ENTROPY_FWD, CROSS_ENTROPY_FWD_BWD, OPTIONS
from fastgpt.ops.linear import product

Gradients = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # after the loss


_budgets: dict[torch.device, int] = {}


def share_for_logits(gpu_memory: int | None) -> int:
    """Return how many bytes of logits are in memory at a time: 1/16 of the GPU memory, 512 MiB on a CPU (None)."""
    return (8 << 30 if gpu_memory is None else gpu_memory) // 16


def logits_budget(device: torch.device) -> int:
    """Return share_for_logits of this device."""
    if device not in _budgets:
        memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        _budgets[device] = share_for_logits(memory)
    return _budgets[device]


# torch.compiler.assume_constant_result without its import of all of Dynamo (0.8 s)
logits_budget._dynamo_marked_constant = True  # type: ignore[attr-defined]


def multiplies_into_fp32(t: Tensor) -> bool:
    """Return whether torch.mm and addmm can return products of 16-bit tensors like `t` in fp32 (out_dtype)."""
    return t.device.type == "cuda"


def logits_of(x: Tensor, w: Tensor, b: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Return x W^T + b, (n, V)."""
    return product(x, w.t(), b, out)


def product_in_fp32(a: Tensor, b: Tensor, total: Tensor | None = None, add: bool = True) -> Tensor:
    """Return a^T b in fp32 for a (n, V) and b (n, C) of one dtype, in `total` (V, C) if given: added to it, or instead
    of what it holds."""
    wide: dict[str, Any] = {}
    if a.dtype != torch.float32 and multiplies_into_fp32(a):
        wide = {"out_dtype": torch.float32}
    elif a.dtype != torch.float32:
        a, b = a.float(), b.float()
    if not wide:
        return product(a.t(), b, out=total, add=total is not None and add)
    if total is None or not add:
        return torch.mm(a.t(), b, out=total, **wide)
    return torch.addmm(total, a.t(), b, out=total, **wide)


def _chunks(n: int, chunk: int) -> Iterator[slice]:
    for start in range(0, n, chunk):
        yield slice(start, min(start + chunk, n))


def _fwd(
    backend: str, x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, weight: Tensor | None, *rest: Any
) -> Tensor:
    """Return the loss (N,) in fp32."""
    *options, chunk = rest
    n = x.shape[0]
    loss = torch.empty(n, dtype=torch.float32, device=x.device)
    buffer = in_huge_pages(x.new_empty((min(chunk, n), w.shape[0])))  # (chunk, V)
    with torch.autocast(x.device.type, enabled=False):
        for rows in _chunks(n, chunk):
            z = logits_of(x[rows], w, b, buffer[: rows.stop - rows.start])
            loss[rows] = CROSS_ENTROPY_FWD[backend](z, target[rows], weight, *options)[0]
    return loss


def loss_and_gradients(
    backend: str, x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, weight: Tensor | None, scale: Tensor,
    *rest: Any, place: Tensor | None = None, filled: bool = False,
) -> Gradients:  # fmt: skip
    """Return the loss (N,), fp32, and the `wanted` gradients of sum(scale * loss): dx in x's dtype, dW and db fp32.

    dW is written to `place` (V, C) fp32 if given, or added to it if it is `filled`.
    """
    *options, chunk, wanted = rest
    n, v, c = x.shape[0], *w.shape
    loss = torch.empty(n, dtype=torch.float32, device=x.device)
    buffer = in_huge_pages(x.new_empty((min(chunk, n), v)))  # (chunk, V): logits, then their gradient
    dx = x.new_empty((n, c)) if wanted[0] else None
    dw = place
    db = loss.new_zeros(v) if wanted[2] and b is not None else None
    with torch.autocast(x.device.type, enabled=False):
        for rows in _chunks(n, chunk):
            dz = logits_of(x[rows], w, b, buffer[: rows.stop - rows.start])
            some = scale if scale.numel() == 1 else scale[rows]
            CROSS_ENTROPY_FWD_BWD[backend](dz, loss[rows], target[rows], weight, some, *options)
            if dx is not None:
                product(dz, w, out=dx[rows])
            if wanted[1]:
                dw = product_in_fp32(dz, x[rows], dw, add=filled or rows.start > 0)
            if db is not None:
                db += dz.sum(0, dtype=torch.float32)
    if wanted[1] and n == 0 and not filled:
        dw = loss.new_zeros((v, c)) if place is None else place.zero_()
    return loss, dx, dw, db


def _fwd_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0],), dtype=torch.float32)


def _fwd_bwd_fake(
    x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, weight: Tensor | None, scale: Tensor, *rest: Any
) -> Gradients:
    loss = _fwd_fake(x)
    for_x, for_w, for_b = rest[-1]
    dx, dw = x.new_empty(x.shape) if for_x else None, loss.new_empty(w.shape) if for_w else None
    return loss, dx, dw, loss.new_empty(b.shape) if for_b and b is not None else None


_ARGUMENTS = "Tensor x, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight"
LINEAR_CROSS_ENTROPY_FWD = define_driver(
    "linear_cross_entropy_fwd", f"({_ARGUMENTS}, {OPTIONS}, SymInt chunk) -> Tensor", _fwd_fake, _fwd
)
LINEAR_CROSS_ENTROPY_FWD_BWD = define_driver(
    "linear_cross_entropy_fwd_bwd",
    f"({_ARGUMENTS}, Tensor scale, {OPTIONS}, SymInt chunk, bool[3] wanted) -> (Tensor, Tensor?, Tensor?, Tensor?)",
    _fwd_bwd_fake,
    loss_and_gradients,
)


def _fwd_flop(x: Sequence[int], w: Sequence[int], *rest: Any, **out: Any) -> int:
    return 2 * x[0] * w[0] * w[1]


def _fwd_bwd_flop(x: Sequence[int], w: Sequence[int], *rest: Any, **out: Any) -> int:
    return _fwd_flop(x, w) * (1 + sum(rest[-1][:2]))


flop_formula("linear_cross_entropy_fwd", _fwd_flop)
flop_formula("linear_cross_entropy_fwd_bwd", _fwd_bwd_flop)
