"""Linear layer with several low-rank adapters, of which each token of a pass uses one or none; for inference.

    y_i = W x_i + b + sum over k with owner_k = index_i of (a_k x_i) b_k      k: the ranks of all adapters together

The A of all adapters are one matrix and so are the B, times their scales. So a layer costs two products more, whatever
the mix of adapters, and its shapes do not depend on the mix: a pass can be recorded in a CUDA graph. Products with the
ranks of other adapters are set to 0 before they meet B.

Source of the formula: fastgpt/nn/lora.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgpt import ops


class RowsLora(nn.Module):
    """Linear layer over another one, whose output it may overwrite.

    Args:
        base: the layer without adapters, (..., C) -> (..., F).
        a: (R, C), of the R ranks of all adapters together.
        b: (R, F), times the scale; 0 where an adapter leaves a column alone.
        owner: (R,) int64, number of the adapter that a rank belongs to, from 1 on.

    Attributes:
        index: (B, 1) or (B, T) int64, number of the adapter of each token of the pass, 0 for none; set it before.

    Shape: input (B, T, C) -> (B, T, F).
    """

    index: Tensor

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, owner: Tensor) -> None:
        super().__init__()
        self.base, self.a, self.b, self.owner = base, a, b, owner

    @torch.no_grad()
    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """Add what the adapters make of x (B, T, C) to y (B, T, F) in place; return y."""
        h = ops.linear(x, self.a)  # (B, T, R)
        h = h.masked_fill_(self.index[..., None] != self.owner, 0.0)
        y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), self.b)
        return y

    def forward(self, input: Tensor) -> Tensor:
        return self.add(self.base(input), input)
