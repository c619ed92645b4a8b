"""Raw op of linear_divergence: loss and the student's gradients, with two reused buffers of (chunk, V) logits.

    z = x W^T + b,  z_t = x_t W_t^T + b_t;  dx = dz W,  dW = dz^T x,  db = sum of dz's rows

One opaque op. torch.mm writes the products to buffers, and the raw op of the same backend turns z into dz
(fastgpt/ops/divergence.py). dW and db are summed over the chunks in fp32 for every dtype. 2 N V (C + C_t) FLOP, and
2 N V C more for each of dx and dW.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt.ops._common import define_driver, flop_formula
from fastgpt.ops._linear_cross_entropy import Gradients, logits_of, product_in_fp32
from fastgpt.ops.divergence import LINEAR_DIVERGENCE_ROWS, OPTIONS, divergence_rows


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a^T b to total, which is fp32 for 16-bit a and b."""
    total.addmm_(a.t(), b) if a.dtype == total.dtype else product_in_fp32(a, b, total)


def run(
    backend: str, x: Tensor, w: Tensor, b: Tensor | None, x_t: Tensor, w_t: Tensor, b_t: Tensor | None,
    target: Tensor | None, scale: Tensor, *rest: Any,
) -> Gradients:  # fmt: skip
    """Return the loss (N,) and the `wanted` gradients of sum(scale * loss): dx in x's dtype, dW and db in fp32."""
    *options, chunk, wanted = rest
    (n, c), v = x.shape, w.shape[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    loss = torch.empty(n, dtype=wide, device=x.device)
    most = min(chunk, n)
    buffer, buffer_t = x.new_empty((most, v)), x_t.new_empty((most, w_t.shape[0]))  # (chunk, V)
    dx = x.new_empty((n, c)) if wanted[0] else None
    dw: Tensor | None = loss.new_zeros((v, c)) if wanted[1] else None
    db = loss.new_zeros(v) if wanted[2] and b is not None else None
    compute = divergence_rows if backend == "torch" else LINEAR_DIVERGENCE_ROWS[backend]
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            z = logits_of(x[rows], w, b, buffer[: rows.stop - start])
            z_t = logits_of(x_t[rows], w_t, b_t, buffer_t[: rows.stop - start])
            z_t = z_t if backend == "torch" else z_t.to(z.dtype)
            on, factor = None if target is None else target[rows], scale if scale.numel() == 1 else scale[rows]
            compute(z, loss[rows], z_t, on, factor, *options)  # z is its gradient from here on
            if dx is not None:
                torch.mm(z, w, out=dx[rows])
            if dw is not None:
                _add_product(dw, z, x[rows])
            if db is not None:
                db += z.sum(0, dtype=wide)
    return loss, dx, dw, db


def _fake(x: Tensor, w: Tensor, b: Tensor | None, *rest: Any) -> Gradients:
    loss = x.new_empty((x.shape[0],), dtype=torch.float32)
    for_x, for_w, for_b = rest[-1]
    dx, dw = x.new_empty(x.shape) if for_x else None, loss.new_empty(w.shape) if for_w else None
    return loss, dx, dw, loss.new_empty(b.shape) if for_b and b is not None else None


LINEAR_DIVERGENCE_FWD = define_driver(
    "linear_divergence_fwd",
    "(Tensor x, Tensor linear_weight, Tensor? linear_bias, Tensor teacher_x, Tensor teacher_weight, "
    f"Tensor? teacher_bias, Tensor? target, Tensor scale, {OPTIONS}, SymInt chunk, bool[3] wanted) "
    "-> (Tensor, Tensor?, Tensor?, Tensor?)",
    _fake,
    run,
)


def _flop(
    x: Sequence[int], w: Sequence[int], b: Any, x_t: Sequence[int], w_t: Sequence[int], *rest: Any, **out: Any
) -> int:
    return 2 * x[0] * (w[0] * w[1] * (1 + sum(rest[-1][:2])) + w_t[0] * w_t[1])


flop_formula("linear_divergence_fwd", _flop)
