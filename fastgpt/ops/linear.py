"""Linear layer with PyTorch's matrix products, whose weight gradient is computed directly in the buffer that keeps it.

    y = x W^T + b;  dx = dy W,  dW = dy^T x,  db = sum over the rows of dy

If the weight has a `grad_buffer`, the matrix product writes dW there: the first backward of a step overwrites the
buffer, later ones add to it (gradient accumulation fusion, as in Megatron-LM). For each weight and step this saves a
new tensor (on a CPU its page faults cost as much as the product at small batches) and, with accumulation, one read and
two writes.

Saved for backward: x and W, as in torch.nn.functional.linear.

Determinism: that of torch.mm.

Limits: under torch.compile or autocast, or without a `grad_buffer`, the call is torch.nn.functional.linear. With a
buffer, first derivatives only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops._common import gradient_place, needs_grad


def weight_gradient(weight: Tensor, dy: Tensor, x: Tensor) -> Tensor | None:
    """Return dy^T x (F, C) for rows dy (N, F) and x (N, C), or None if it was written to the buffer of the weight."""
    place, holds_sum = gradient_place(weight)
    if place is None:
        return dy.t() @ x
    if holds_sum:
        torch.addmm(place, dy.t(), x, out=place)  # PyTorch's FLOP counter does not count addmm_
    else:
        torch.mm(dy.t(), x, out=place)
    weight.grad = place
    return None


class LinearFn(torch.autograd.Function):
    """Autograd of a linear layer over rows: (x, weight, bias) -> y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.has_bias, ctx.owner = bias is not None, weight  # saved-tensor hooks return a copy without the buffer
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = (rows @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        dweight = weight_gradient(ctx.owner, rows, x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        dbias = rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return dx, dweight, dbias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute torch.nn.functional.linear; the gradient of a weight with a `grad_buffer` (fastgpt.nn.keep_gradients) is
    written there.

    Args:
        x: (..., C).
        weight: (F, C).
        bias: (F,), or None.

    Returns:
        (..., F).

    Raises:
        RuntimeError: as torch.nn.functional.linear, for shapes or dtypes that do not fit.

    Example:
        >>> import torch
        >>> from fastgpt import nn, ops
        >>> layer = nn.Linear(64, 32)
        >>> nn.keep_gradients(layer, min_numel=1)
        >>> ops.linear(torch.randn(8, 64), layer.weight, layer.bias).sum().backward()
        >>> layer.weight.grad is layer.weight.grad_buffer
        True
    """
    kept = getattr(weight, "grad_buffer", None) is not None and not torch.compiler.is_compiling()
    if not kept or not needs_grad(weight) or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    y: Tensor = LinearFn.apply(x, weight, bias)
    return y
