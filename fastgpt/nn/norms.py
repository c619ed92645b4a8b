"""LayerNorm and RMSNorm, each with an optional residual that is added in the same pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.core.fallback import leave_to_torch


def _over_last(
    name: str,
    norm: Callable[..., Any],
    shape: tuple[int, ...],
    x: Tensor,
    residual: Tensor | None,
    x_bias: Tensor | None,
    *params: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Apply norm(x, *params, residual=, x_bias=) over the trailing dimensions `shape` of x, flattened into one in all
    tensors.

    Raises:
        ValueError: x does not end in `shape`.
    """
    n = len(shape)
    if not n or x.dim() < n or tuple(x.shape[-n:]) != shape:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}, expected (..., {', '.join(map(str, shape))})")
    flat = [p.flatten() if isinstance(p, Tensor) else p for p in params]
    added = (residual.flatten(-n) if residual is not None else None, x_bias.flatten() if x_bias is not None else None)
    out = norm(x.flatten(-n), *flat, residual=added[0], x_bias=added[1])
    return out.view(x.shape) if residual is None else tuple(t.view(x.shape) for t in out)


def _mixed(x: Tensor, weight: Tensor | None) -> bool:
    """Return whether the ops do not support this dtype of the weight with x: it is neither that of x nor fp32."""
    return weight is not None and weight.dtype not in (x.dtype, torch.float32)


def epsilon(eps: float | None, x: Tensor) -> float:
    """Return eps of RMSNorm for x; None means PyTorch's default: the machine epsilon of fp32, or of fp64 for fp64 x."""
    return torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if eps is None else eps


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm, with an optional residual added first, and with it the bias of the linear layer before.

    The arguments of the constructor are those of torch.nn.LayerNorm.

    Shape: input `(..., *normalized_shape)`; the parameters are of the same dtype or fp32.

    Returns:
        y of the shape and dtype of input; with `residual` (of the same shape and dtype) the pair (y, input + residual),
        where `x_bias` (of normalized_shape) is a third summand.
    """

    @overload
    def forward(self, input: Tensor, residual: None = None) -> Tensor: ...

    @overload
    def forward(self, input: Tensor, residual: Tensor, x_bias: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, input: Tensor, residual: Tensor | None = None, x_bias: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        weight = self.weight
        if residual is None and _mixed(input, weight):
            leave_to_torch("LayerNorm", f"a weight of {weight.dtype} with input of {input.dtype}")
            return super().forward(input)
        if weight is None or weight.dim() != 1:  # the op itself checks a weight of one dimension against x
            params = (weight, self.bias, self.eps)
            return _over_last("LayerNorm", ops.layer_norm, self.normalized_shape, input, residual, x_bias, *params)
        return ops.layer_norm(input, weight, self.bias, self.eps, residual=residual, x_bias=x_bias)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm, with an optional residual added first, and with it the bias of the linear layer before.

    The other arguments of the constructor are those of torch.nn.RMSNorm.

    Args:
        eps: None means PyTorch's default, the machine epsilon of fp32 (of fp64 for fp64 x).
        weight_offset: added to the weight; 1.0 for weights stored as a difference from one (Gemma), which are then
            initialised to 0.

    Shape: x `(..., *normalized_shape)`; the weight is of the same dtype or fp32.

    Returns:
        y of the shape and dtype of x; with `residual` (of the same shape and dtype) the pair (y, x + residual), where
        `x_bias` (of normalized_shape) is a third summand.
    """

    weight_offset: float = 0.0

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        weight_offset: float = 0.0,
    ) -> None:
        self.weight_offset = weight_offset  # the constructor calls reset_parameters, which reads it
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)

    def reset_parameters(self) -> None:
        if self.elementwise_affine:
            nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    @overload
    def forward(self, x: Tensor, residual: None = None) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, residual: Tensor, x_bias: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, x: Tensor, residual: Tensor | None = None, x_bias: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        weight, offset = self.weight, self.weight_offset
        if residual is None and not offset and _mixed(x, weight):
            leave_to_torch("RMSNorm", f"a weight of {weight.dtype} with x of {x.dtype}")
            return super().forward(x)
        eps = epsilon(self.eps, x)
        if weight is None or weight.dim() != 1:

            def norm(x: Tensor, weight: Tensor | None, residual: Tensor | None, x_bias: Tensor | None) -> Any:
                return ops.rms_norm(x, weight, eps, residual=residual, weight_offset=offset, x_bias=x_bias)

            return _over_last("RMSNorm", norm, self.normalized_shape, x, residual, x_bias, weight)
        return ops.rms_norm(x, weight, eps, residual=residual, weight_offset=offset, x_bias=x_bias)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", weight_offset={self.weight_offset}" if self.weight_offset else "")
