"""The upstream gradient of a loss, announced before its forward, so that the loss folds it into the gradient it writes.

A loss that computes its gradient in forward does not know the upstream gradient yet, and multiplies by it in backward:
a pass over everything that it wrote. A training loop knows it: 1 / (the step's tokens). Announced, it costs nothing:

    with expected_gradient(share):
        loss = model(ids, targets, reduction="sum")
    loss.backward(share)

Backward compares addresses, not values, so nothing waits for the device. With another gradient than the announced
tensor, the result is the same and takes the pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_expected: Tensor | None = None


@contextmanager
def expected_gradient(gradient: Tensor) -> Iterator[None]:
    """Announce the upstream gradient, (1,) fp32, of the losses that run inside. It must not be 0 or change before
    backward."""
    global _expected
    before, _expected = _expected, gradient
    try:
        yield
    finally:
        _expected = before


def run_backward(output: Tensor, gradient: Tensor) -> None:
    """Run output.backward(gradient), of the same shape. PyTorch's function compares the shapes as symbolic ones, which
    imports SymPy: half a second, and 30 MB for good."""
    arguments: dict[str, bool] = dict(allow_unreachable=True, accumulate_grad=True)
    torch.autograd.graph._engine_run_backward((output,), (gradient,), False, False, (), **arguments)


def expected_like(x: Tensor) -> Tensor | None:
    """Return the announced gradient for a loss of x, or None. fp16 has too few exponents to hold it in a gradient."""
    if torch.compiler.is_compiling() or _expected is None:
        return None
    return _expected if x.dtype != torch.float16 and _expected.device == x.device else None


def not_folded(gradient: Tensor, expected: Tensor | None) -> Tensor | None:
    """Return the factor, (1,) fp32, by which a gradient that holds `expected` must still be multiplied; None if
    `gradient` is the announced tensor or a view of it."""
    rows = gradient.float().reshape(-1)
    if expected is None:
        return rows.contiguous()
    return None if rows.data_ptr() == expected.data_ptr() else rows / expected
