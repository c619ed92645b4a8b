"""layer_norm and rms_norm with x_bias: what parity's cases leave out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import ops, parity
from fastgpt.core import backend

NORMS: dict[str, Callable[..., Any]] = {"layer_norm": ops.layer_norm, "rms_norm": ops.rms_norm}
ON = [(op, name) for op in NORMS for name in (*parity.backends_here(op), "torch")]


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    """Return x, residual (5, 7, 24) and x_bias (24)."""
    g = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 5, 7, 24, generator=g).unbind()
    return x.requires_grad_(), residual.requires_grad_(), torch.randn(24, generator=g).requires_grad_()


@pytest.mark.parametrize("op,name", ON)
@pytest.mark.parametrize("which", ["both", "y", "sum"])
def test_the_gradient_of_x_bias_is_the_sum_of_dx(op: str, name: str, which: str) -> None:
    """Also if y or the sum is not used, where backward has no dsum or runs no kernel."""

    x, residual, x_bias = leaves()
    upstream = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(1))
    with backend.use(strict=True, **{op: name}):  # type: ignore[arg-type]
        out = NORMS[op](x, residual=residual, x_bias=x_bias)
        used = {"both": (0, 1), "y": (0,), "sum": (1,)}[which]
        torch.autograd.backward([out[i] for i in used], [upstream[i] for i in used])
    dx, dx_bias = x.grad, x_bias.grad
    assert dx is not None and dx_bias is not None and residual.grad is not None and torch.equal(dx, residual.grad)
    torch.testing.assert_close(dx_bias, dx.sum((0, 1)))


@pytest.mark.parametrize("op,name", ON)
def test_a_frozen_x_bias_counts_and_has_no_gradient(op: str, name: str) -> None:
    x, residual, x_bias = leaves()
    frozen = x_bias.detach()
    with backend.use(strict=True, **{op: name}):  # type: ignore[arg-type]
        y, total = NORMS[op](x, residual=residual, x_bias=frozen)
        assert torch.equal(total, x + frozen + residual)
        y.sum().backward()
    assert frozen.grad is None and x.grad is not None
