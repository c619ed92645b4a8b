"""Linear layers whose weight gradients keep the same buffers between steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgpt import ops

KEPT_NUMEL = 2**18  # smaller matrices gain less from a buffer than an autograd function in Python costs


def keep_gradients(module: nn.Module, min_numel: int = KEPT_NUMEL) -> None:
    """Allocate a `grad_buffer` for every matrix of at least min_numel elements, to hold its gradient in every step.

    The backward of fastgpt's linear layers, embeddings and LM head then writes (after zero_grad(set_to_none=True)) or
    adds the gradient there instead of allocating a tensor. Use it in one process and in eager mode: hooks of DDP and
    FSDP see no gradient, and torch.compile ignores the buffers. Call it again after moving or casting the module;
    until then the old buffers are ignored.
    """
    for p in module.parameters():
        if p.dim() == 2 and p.numel() >= min_numel and p.requires_grad:
            p.grad_buffer = torch.empty_like(p)  # type: ignore[attr-defined]


class Linear(nn.Linear):
    """torch.nn.Linear whose weight gradient is written to the buffer that `keep_gradients` allocated.

    The arguments of the constructor are those of torch.nn.Linear.

    Shape: input (..., in_features) -> (..., out_features).
    """

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)
