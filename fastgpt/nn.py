"""Modules over fastgpt.ops: PyTorch's names, arguments, initial values and state_dict keys; no maths of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import ops

KEPT_NUMEL = 2**18  # smaller matrices gain less from a buffer than an autograd function in Python costs


def keep_gradients(module: nn.Module, min_numel: int = KEPT_NUMEL) -> None:
    """Give every matrix of min_numel elements and more a `grad_buffer`: memory its gradient stays in between steps.

    Backward of fastgpt's linear layers, embeddings and LM head then writes (after zero_grad(set_to_none=True)) or adds
    the gradient there instead of making a new tensor. For one process, eager: hooks of DDP and FSDP see no gradient,
    and torch.compile traces the usual way. Call it again after moving or casting the module.
    """
    for p in module.parameters():
        if p.dim() == 2 and p.numel() >= min_numel and p.requires_grad:
            p.grad_buffer = torch.empty_like(p)  # type: ignore[attr-defined]


def _one_dimension(name: str, shape: int | list[int] | torch.Size | tuple[int, ...]) -> None:
    if not isinstance(shape, int) and len(shape) != 1:
        raise ValueError(f"{name}: normalized_shape is {tuple(shape)}, expected one dimension, the last of x")


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm over the last dimension, with an optional residual added first.

    Args: as torch.nn.LayerNorm; normalized_shape is one number (or a tuple of one). x: (..., C).

    Returns:
        y (..., C); with `residual` the pair (y, x + residual).
    """

    def __init__(self, normalized_shape: int | list[int] | torch.Size, eps: float = 1e-5, **options: Any) -> None:
        _one_dimension("LayerNorm", normalized_shape)
        super().__init__(normalized_shape, eps, **options)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return ops.layer_norm(x, self.weight, self.bias, self.eps, residual=residual)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm over the last dimension, with an optional residual added first.

    Args: as torch.nn.RMSNorm; normalized_shape is one number (or a tuple of one). x: (..., C). eps=None means the
        machine epsilon of x's dtype, as in PyTorch.

    Returns:
        y (..., C); with `residual` the pair (y, x + residual).
    """

    def __init__(
        self, normalized_shape: int | list[int] | torch.Size, eps: float | None = None, **options: Any
    ) -> None:
        _one_dimension("RMSNorm", normalized_shape)
        super().__init__(normalized_shape, eps, **options)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return ops.rms_norm(x, self.weight, eps, residual=residual)


class Linear(nn.Linear):
    """torch.nn.Linear whose weight gradient goes where `keep_gradients` said.

    Args: as torch.nn.Linear. x: (..., in_features) -> (..., out_features).
    """

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)
