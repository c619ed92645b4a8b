"""LM head and loss in one op: cross_entropy(x @ linear_weight.T + linear_bias, target)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastgpt.backend import register, select
from fastgpt.ops._common import autocast, check_float, check_like
from fastgpt.ops.cross_entropy import cross_entropy

register("linear_cross_entropy")


def linear_cross_entropy(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    chunk: int | str = "auto",
    **options: Any,
) -> Tensor:
    """Cross-entropy of a linear layer's logits.

    Args:
        x: (N, C); linear_weight: (V, C) and linear_bias (V,) in x's dtype; target: (N,) int64.
        chunk: rows of logits in memory at a time; the reference makes them all at once.
        options: weight, ignore_index, label_smoothing, z_loss, softcap, vocab_size, reduction: as in `cross_entropy`.

    Returns:
        The loss in fp32 (fp64 for fp64 input): (N,) for reduction "none", else 0-dim.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    check_float("linear_cross_entropy", "x", x)
    if x.dim() != 2 or linear_weight.dim() != 2 or x.shape[1] != linear_weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: x {tuple(x.shape)} and linear_weight {tuple(linear_weight.shape)}, "
            f"expected (N, C) and (V, C)"
        )
    cast = autocast(x, linear_weight, linear_bias)
    x, linear_weight, linear_bias = cast[0], cast[1], cast[2]  # type: ignore[assignment]
    v = (linear_weight.shape[0],)
    check_like("linear_cross_entropy", "linear_bias", linear_bias, v, x, (x.dtype,), "to match linear_weight's rows")
    if chunk != "auto" and not (isinstance(chunk, int) and chunk >= 1):
        raise ValueError(f"linear_cross_entropy: chunk is {chunk!r}, expected 'auto' or a number of rows")
    select("linear_cross_entropy", x)
    # The logits are this op's own, so their gradient may take their place.
    return cross_entropy(F.linear(x, linear_weight, linear_bias), target, inplace=True, **options)
