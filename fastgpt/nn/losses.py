"""Cross-entropy of logits, and of the output of a linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _WeightedLoss

from fastgpt import ops
from fastgpt.core.fallback import leave_to_torch
from fastgpt.nn._hooks import plain

_Stock: Any = getattr(nn, "LinearCrossEntropyLoss", _WeightedLoss)  # available from PyTorch 2.13 on


def _uncovered(input: Tensor, target: Tensor) -> str | None:
    """Return which input the ops do not support, or None for input (N, C) and class numbers (N,)."""
    if target.is_floating_point():
        return "class probabilities as target"
    if input.dim() != 2 or target.dim() != 1:
        return f"input of {input.dim()} dimensions and target of {target.dim()}"
    return None if target.dtype == torch.int64 else f"target of {target.dtype}"


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss, with a loss in fp32 even for 16-bit logits.

    The other arguments of the constructor are those of torch.nn.CrossEntropyLoss.

    Args:
        z_loss: factor of the squared log-sum-exp, which is added to the loss; 0 disables it.
        softcap: logits become softcap * tanh(logits / softcap); 0 disables it.

    Shape: input (N, C), target (N,) int64 -> () or, for reduction "none", (N,). Class probabilities and inputs of
    other dimensions fall back to PyTorch's loss, or raise ValueError if z_loss or softcap is set.
    """

    z_loss: float = 0.0
    softcap: float = 0.0

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float = 0.0,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.softcap = z_loss, softcap

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if why := _uncovered(input, target):
            _leave("CrossEntropyLoss", self, why)
            return super().forward(input, target)
        return ops.cross_entropy(input, target, **_options(self))

    def extra_repr(self) -> str:
        return _repr(self)


class LinearCrossEntropyLoss(_Stock):  # type: ignore[misc]
    """torch.nn.LinearCrossEntropyLoss (PyTorch 2.13): cross-entropy of the output of a linear layer.

    Where the logits would be large, only part of them is in memory. The loss is in fp32 even for 16-bit input. The
    other arguments of the constructor are those of torch.nn.LinearCrossEntropyLoss; `options`, which chooses PyTorch's
    chunks, applies only to calls that fall back to PyTorch's loss.

    Args:
        z_loss, softcap: as in `CrossEntropyLoss`.
        chunk: as in fastgpt.ops.linear_cross_entropy.

    Shape: input (N, in_features), target (N,) int64 -> () or, for reduction "none", (N,). Keys: linear.weight
    (num_classes, in_features) and linear.bias; `loss.linear.weight = embedding.weight` ties the two weights. A linear
    layer that was replaced or has hooks is called as a module, which computes all logits at once. out_features, class
    probabilities and other dimensions fall back to PyTorch's loss, or raise ValueError if it does not support them.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        chunk: int | str = "auto",
    ) -> None:
        if _Stock is _WeightedLoss:
            super().__init__(weight=weight, reduction=reduction)
            self.num_classes, self.out_features, self.options = num_classes, out_features, options
            self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
            self.linear = nn.Linear(in_features, num_classes, bias, device, dtype)
        else:
            stock = dict(out_features=out_features, bias=bias, device=device, dtype=dtype, reduction=reduction)
            stock |= dict(weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing, options=options)
            super().__init__(in_features, num_classes, **stock)
        self.z_loss, self.softcap, self.chunk = z_loss, softcap, chunk

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        why = f"out_features={self.out_features}" if self.out_features else _uncovered(input, target)
        if why is not None:
            _leave("LinearCrossEntropyLoss", self, why)
            if _Stock is _WeightedLoss:
                raise ValueError(f"LinearCrossEntropyLoss: {why}: torch.nn supports it from PyTorch 2.13 on")
            out: Tensor = super().forward(input, target)
            return out
        if type(self.linear).forward is not nn.Linear.forward or not plain(self.linear):  # it has an adapter or a hook
            return ops.cross_entropy(self.linear(input), target, **_options(self))
        options = {**_options(self), "linear_bias": self.linear.bias, "chunk": self.chunk}
        return ops.linear_cross_entropy(input, self.linear.weight, target, **options)

    def extra_repr(self) -> str:
        return _repr(self, "num_classes", "out_features")


def _leave(name: str, loss: Any, why: str) -> None:
    if loss.z_loss or loss.softcap:
        raise ValueError(f"{name}: {why}, with z_loss or softcap: expected input (N, C) and target (N,) int64")
    leave_to_torch(name, why)


def _options(loss: Any) -> dict[str, Any]:
    """Return the settings of a loss module as keyword arguments of the ops."""
    names = ("weight", "label_smoothing", "reduction", "z_loss", "softcap")
    ignore = -100 if loss.ignore_index is None else loss.ignore_index
    return {"ignore_index": ignore, **{n: getattr(loss, n) for n in names}}


def _repr(loss: Any, *first: str) -> str:
    names = (*first, "ignore_index", "reduction", "label_smoothing", "z_loss", "softcap")
    return ", ".join(f"{n}={getattr(loss, n)!r}" for n in names)
