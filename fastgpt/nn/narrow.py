"""Linear layers and embeddings for inference, whose weights are narrower than the activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgpt import ops


class NarrowLinear(nn.Module):
    """Linear layer without gradients.

    Args:
        weight: (F, C), bf16 or fp16 for fp32 input, or int8.
        scale: (F,) fp32, of an int8 weight; None otherwise.
        bias: (F,) in the dtype of the input, or None.

    Shape: input (..., C) -> (..., F).
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        for name, t in (("weight", weight), ("scale", scale), ("bias", bias)):
            self.register_buffer(name, None if t is None else t.detach())
        self.out_features, self.in_features = weight.shape

    def forward(self, input: Tensor, tied: Tensor | None = None) -> Tensor:
        """Return the product. tied: ignored; a head shares the memory of the embedding it is tied to."""
        return ops.linear(input, self.weight, self.bias, scale=self.scale)


class NarrowEmbedding(nn.Module):
    """Embedding without gradients, whose rows are widened when they are looked up.

    Args:
        weight: (V, C), of 16 bits or int8.
        scale: (V,) fp32, of an int8 weight; None otherwise.
        dtype: of the rows returned.

    Shape: input (...) int64 -> (..., C).
    """

    weight: Tensor
    scale: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("weight", weight.detach())
        self.register_buffer("scale", None if scale is None else scale.detach())

    def forward(self, input: Tensor) -> Tensor:
        rows = self.weight[input].to(self.dtype)
        return rows if self.scale is None else rows * self.scale[input, None].to(self.dtype)
