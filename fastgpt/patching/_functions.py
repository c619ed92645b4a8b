"""Replacements for functions of torch that a method calls by name; calls that an op does not cover go to PyTorch, and a
log line says so once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.core.fallback import leave_to_torch
from fastgpt.nn.norms import epsilon
from fastgpt.patching._replace import fits, plain


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Replace F.scaled_dot_product_attention: q (B, H, T, D); calls that the op does not cover go to PyTorch."""
    why = ""
    if attn_mask is not None:
        why = "an attn_mask"
    elif query.dim() != 4 or not plain(query, key, value) or key.shape != value.shape:
        why = "tensors that are not (B, H, T, D), or a key and a value of different shapes"
    elif query.shape[1] != key.shape[1] and not enable_gqa:
        why = "broadcast heads"
    elif is_causal and query.shape[2] != key.shape[2]:  # PyTorch aligns at the top left, the op at the bottom right
        why = "is_causal with queries and keys of different lengths"
    if why:
        leave_to_torch("attention", f"scaled_dot_product_attention with {why}")
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return ops.attention(q, k, v, causal=is_causal, dropout_p=dropout_p, scale=scale).transpose(1, 2)


def functional_layer_norm(
    input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    """Replace F.layer_norm over one dimension."""
    if len(normalized_shape) != 1 or not fits((input,), {}, normalized_shape[0], weight, bias):
        leave_to_torch("layer_norm", "several dimensions, or dtypes that the op does not support")
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    return ops.layer_norm(input, weight, bias, eps)


def functional_rms_norm(input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
    """Replace F.rms_norm over one dimension."""
    if len(normalized_shape) != 1 or not fits((input,), {}, normalized_shape[0], weight):
        leave_to_torch("rms_norm", "several dimensions, or dtypes that the op does not support")
        return F.rms_norm(input, normalized_shape, weight, eps)
    return ops.rms_norm(input, weight, epsilon(eps, input))


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Replace F.cross_entropy of logits (N, V) and targets (N,); the op's loss is fp32 for any dtype of the logits."""
    usual = input.dim() == 2 and target.dim() == 1 and target.dtype == torch.int64 and plain(input, target, weight)
    if not usual or size_average is not None or reduce is not None:
        leave_to_torch("cross_entropy", "inputs other than (N, V) logits and (N,) class indices")
        options: dict[str, Any] = dict(ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
        return F.cross_entropy(input, target, weight, size_average, reduce=reduce, **options)
    return ops.cross_entropy(
        input,
        target,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def cross_entropy_loss(module: Any, input: Tensor, target: Tensor) -> Tensor:
    """Replace nn.CrossEntropyLoss."""
    options: dict[str, Any] = dict(reduction=module.reduction, label_smoothing=module.label_smoothing)
    return cross_entropy(input, target, module.weight, ignore_index=module.ignore_index, **options)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """nn.CrossEntropyLoss on the op, for methods that make one."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy_loss(self, input, target)
