"""Packed projection to queries, keys and values, whose gradient comes in three tensors.

    (q | k | v) = x W^T + b
    dx = dq W_q + dk W_k + dv W_v,  dW = (dq^T x; dk^T x; dv^T x),  db = sum_N(dq | dk | dv)

Forward is one product, and q, k and v are views of its result. PyTorch's split would concatenate dq, dk and dv in
backward: a read and a write of all three. Here one kernel computes dx from three factors, and PyTorch's products write
dW in three parts. Where the gradient is packed already (`attention_qkv` on fastgpt's kernels), this op gains nothing.

Saved for backward: x and W.

Determinism: the kernel's is bitwise. PyTorch's products and sums have the determinism of torch.mm and torch.sum.

Limits: W and b are in x's dtype. First derivatives only. On the `torch` backend, as on a CPU, it is a linear layer and
a split.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.core.backend import Cell, register, select
from fastgpt.ops._common import (
    autocast,
    check_float,
    check_like,
    define,
    flop_formula,
    needs_grad,
    relative_error,
    rows_of,
)
from fastgpt.ops.linear import linear, weight_gradient


def _bwd_fake(dq: Tensor, dk: Tensor, dv: Tensor, weight: Tensor) -> Tensor:
    return dq.new_empty((dq.shape[0], weight.shape[1]))


LINEAR_QKV_BWD = define(
    "linear_qkv", "linear_qkv_bwd", "(Tensor dq, Tensor dk, Tensor dv, Tensor weight) -> Tensor", _bwd_fake
)
flop_formula("linear_qkv_bwd", lambda dq, dk, dv, weight, *args, **kwargs: 2 * dq[0] * weight[0] * weight[1])


def linear_qkv_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, n_kv: int) -> tuple[Tensor, ...]:
    """Compute the formula at the head of this file, in fp32 (fp64 for fp64 input). The parity tests take it as the
    truth."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight.to(wide).t()
    y = (y if bias is None else y + bias).to(x.dtype)
    return y.split(_sizes(weight, n_kv), dim=-1)


def linear_qkv_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, n_kv: int) -> tuple[Tensor, ...]:
    """Compute the parity baseline: PyTorch's layer and its split."""
    return F.linear(x, weight, bias).split(_sizes(weight, n_kv), dim=-1)


def _sizes(weight: Tensor, n_kv: int) -> list[int]:
    return [weight.shape[0] - 2 * n_kv, n_kv, n_kv]


class LinearQkvFn(torch.autograd.Function):
    """Autograd over the raw op: (backend, x, weight, bias, columns of k) -> (q, k, v)."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, x: Tensor, weight: Tensor, bias: Tensor | None, n_kv: int
    ) -> tuple[Tensor, ...]:
        ctx.backend, ctx.n_kv = backend, n_kv
        ctx.owner = weight  # saved-tensor hooks return a copy without the buffer
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias).split(_sizes(weight, n_kv), dim=-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        rows = [rows_of(g) for g in grads]
        dx = LINEAR_QKV_BWD[ctx.backend](*rows, weight).view(x.shape) if of_x else None
        dweight = weight_gradient(ctx.owner, rows_of(x), *rows) if of_weight else None
        dbias = torch.cat([g.sum(0) for g in rows]) if of_bias else None
        return None, dx, dweight, dbias, None


def _self_check(backend: str, device: torch.device) -> float:
    """Compare tiles that are cut off at every edge in fp32 and, on a GPU, whole ones of the tensor cores in bf16."""
    worst = 0.0
    kinds = [(torch.float32, (70, 20, 36, 12))] + [(torch.bfloat16, (150, 272, 256, 128))] * (device.type == "cuda")
    for dtype, (n, c, q, kv) in kinds:
        grads = [torch.randn(n, size, device=device).to(dtype) for size in (q, kv, kv)]
        weight = torch.randn(q + 2 * kv, c, device=device).to(dtype)
        got = LINEAR_QKV_BWD[backend](*grads, weight)
        worst = max(worst, relative_error([got], [torch.cat(grads, 1).double() @ weight.double()]))
    return worst


register("linear_qkv", _self_check, triton=Cell())


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, n_kv: int) -> None:
    op = "linear_qkv"
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        shape = f"weight has shape {tuple(weight.shape)}, expected (F, C)"
        raise ValueError(f"{op}: {shape} with x {tuple(x.shape)} as (..., C)")
    if not 0 <= 2 * n_kv <= weight.shape[0]:
        raise ValueError(f"{op}: n_kv is {n_kv}, expected 0 to half of weight's {weight.shape[0]} rows")
    check_like(op, "weight", weight, tuple(weight.shape), x, (x.dtype,), "")
    check_like(op, "bias", bias, (weight.shape[0],), x, (x.dtype,), "to match weight's rows")


def linear_qkv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, n_kv: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return linear(x, weight, bias) in three parts, whose gradients are never concatenated.

    The gradient of a weight with a `grad_buffer` (fastgpt.nn.keep_gradients) is written there. Under autocast x, weight
    and bias are cast to its dtype.

    Args:
        x: (..., C) fp32, bf16, fp16 (fp64 on the reference).
        weight: (F, C) in x's dtype: rows of the queries, then n_kv of the keys, then n_kv of the values.
        bias: (F,) in x's dtype, or None.
        n_kv: columns of the keys, and as many of the values.

    Returns:
        q (..., F - 2 n_kv), k and v (..., n_kv) in x's dtype: views of one tensor. They must not be changed in place.

    Raises:
        ValueError, TypeError: with the argument, the value received and the value expected.

    Example:
        >>> import torch
        >>> from fastgpt import ops
        >>> layer = torch.nn.Linear(64, 64 + 2 * 32)
        >>> q, k, v = ops.linear_qkv(torch.randn(8, 64), layer.weight, layer.bias, n_kv=32)
        >>> q.shape, k.shape
        (torch.Size([8, 64]), torch.Size([8, 32]))
    """
    for name, t in (("x", x), ("weight", weight)):
        check_float("linear_qkv", name, t)
    x, weight, bias = autocast(x, weight, bias)  # type: ignore[assignment]
    _check(x, weight, bias, n_kv)
    backend = select("linear_qkv", x)
    if backend == "torch" or not needs_grad(x, weight, bias):
        q, k, v = linear(x, weight, bias).split(_sizes(weight, n_kv), dim=-1)
    else:
        q, k, v = LinearQkvFn.apply(backend, x, weight, bias, n_kv)
    return q, k, v
