"""Token embedding."""

from __future__ import annotations

from torch import Tensor, nn

from fastgpt import ops
from fastgpt.core.fallback import leave_to_torch


class Embedding(nn.Embedding):
    """torch.nn.Embedding whose gradient is summed in fp32, in the order of the tokens.

    The arguments of the constructor are those of torch.nn.Embedding. With max_norm, scale_grad_by_freq or sparse it
    falls back to PyTorch's embedding.

    Shape: input (...) int64 or int32 -> (..., embedding_dim).
    """

    def forward(self, input: Tensor) -> Tensor:
        given = uncovered(self)
        if not given:
            return ops.embedding(input, self.weight, padding_idx=self.padding_idx)
        leave_to_torch("Embedding", ", ".join(f"{n}={getattr(self, n)}" for n in given))
        return super().forward(input)


def uncovered(m: nn.Embedding) -> list[str]:
    """Return the options set on an nn.Embedding that ops.embedding does not support."""
    names = ("max_norm", "scale_grad_by_freq", "sparse")
    return [n for n in names if getattr(m, n) is not None and getattr(m, n) is not False]  # max_norm=0.0 counts as set
