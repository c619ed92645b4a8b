"""Autograd of bias_gelu and swiglu: y = f(a, b) element by element, with one option."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgpt.ops._common import needs_grad


class PointwiseFn(torch.autograd.Function):
    """Autograd over the raw ops: (fwd, bwd, a, b or None, option) -> y. Saves a and b."""

    @staticmethod
    def forward(
        ctx: Any, fwd: Callable[..., Tensor], bwd: Callable[..., Any], a: Tensor, b: Tensor | None, option: int
    ) -> Tensor:
        ctx.bwd, ctx.option = bwd, option
        ctx.save_for_backward(a, b)
        return fwd(a, b, option)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        da, db = ctx.bwd(dy, *ctx.saved_tensors, ctx.option)
        return None, None, da, db, None


def pointwise(fwd: Callable[..., Tensor], bwd: Callable[..., Any], a: Tensor, b: Tensor | None, option: int) -> Tensor:
    """Return fwd(a, b, option); bwd(dy, a, b, option) computes the gradients of a and b."""
    if needs_grad(a, b):
        y: Tensor = PointwiseFn.apply(fwd, bwd, a, b, option)
        return y
    return fwd(a, b, option)
