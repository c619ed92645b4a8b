"""Token embedding."""

from __future__ import annotations

from torch import Tensor, nn

from fastgpt import ops
from fastgpt.backend import leave_to_torch


class Embedding(nn.Embedding):
    """torch.nn.Embedding whose gradient is summed in fp32, in the tokens' order.

    Args: as torch.nn.Embedding; max_norm, scale_grad_by_freq and sparse go to torch's own.

    Shape: input (...) int64 or int32 -> (..., embedding_dim).
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.max_norm is None and not (self.scale_grad_by_freq or self.sparse):
            return ops.embedding(input, self.weight, padding_idx=self.padding_idx)
        names = ("max_norm", "scale_grad_by_freq", "sparse")
        given = [n for n in names if getattr(self, n) is not None and getattr(self, n) is not False]
        leave_to_torch("Embedding", ", ".join(f"{n}={getattr(self, n)}" for n in given))
        return super().forward(input)
