"""What takes the place of forwards: each is called with the module first and goes to fastgpt.ops, or, for a call that
the op does not cover, to the module's own forward (said once)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.core.backend import leave_to_torch
from fastgpt.nn.attention import attend
from fastgpt.nn.norms import epsilon

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def own(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward, that of its class."""
    return type(module).forward(module, *args, **kwargs)


def _plain(*tensors: Any) -> bool:
    """Whether these are ordinary dense tensors (None counts): no DTensor, no nested tensor."""
    return all(t is None or (type(t) in (Tensor, nn.Parameter) and not t.is_nested) for t in tensors)


def _fits(args: tuple[Any, ...], kwargs: dict[str, Any], *vectors: Any) -> bool:
    """Whether the call is one floating-point tensor beside vectors that an op takes with it: of its dtype, or fp32."""
    if kwargs or len(args) != 1 or not _plain(*args, *vectors):
        return False
    dtype = args[0].dtype
    return dtype in FLOATS and all(v is None or v.dtype in (dtype, torch.float32) for v in vectors)


def layer_norm(module: Any, eps: float, *args: Any, **kwargs: Any) -> Tensor:
    """x (..., C) -> (..., C)."""
    weight, bias = module.weight, getattr(module, "bias", None)
    if not _fits(args, kwargs, weight, bias) or (bias is not None and bias.dtype != weight.dtype):
        leave_to_torch("layer_norm", f"{type(module).__name__} got other arguments or dtypes than the op takes")
        return own(module, *args, **kwargs)
    return ops.layer_norm(args[0], weight, bias, eps)


def rms_norm(module: Any, eps: float | None, offset: float, *args: Any, **kwargs: Any) -> Tensor:
    """x (..., C) -> (..., C); the weight counts as offset + weight."""
    if not _fits(args, kwargs, module.weight):
        leave_to_torch("rms_norm", f"{type(module).__name__} got other arguments or dtypes than the op takes")
        return own(module, *args, **kwargs)
    return ops.rms_norm(args[0], module.weight, epsilon(eps, args[0]), weight_offset=offset)


def is_plain_linear(m: nn.Module) -> bool:
    """A linear layer whose call is x W + b and nothing else: no adapter, no hook, no forward of its own."""
    hooked = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    if hooked or "forward" in m.__dict__:
        return False
    return type(m).forward is nn.Linear.forward or is_conv1d(m)


def is_conv1d(m: nn.Module) -> bool:
    """transformers' Conv1D, GPT-2's linear layer with its weight (in, out)."""
    return type(m).__module__ == "transformers.pytorch_utils" and type(m).__name__ == "Conv1D"


def gelu_mlp(module: nn.Module, up: str, approximate: str, rest: tuple[str, ...], *args: Any, **kwargs: Any) -> Tensor:
    """rest(gelu(up(x))): bias and GELU in one pass where `up` is a plain linear layer, else GELU alone."""
    if kwargs or len(args) != 1:
        return own(module, *args, **kwargs)
    first: Any = getattr(module, up)
    bias = first.bias if is_plain_linear(first) else None
    if bias is None or not _plain(args[0], first.weight, bias):
        x, bias = first(args[0]), None
    else:
        x = args[0] @ first.weight if is_conv1d(first) else F.linear(args[0], first.weight)
    if bias is not None and bias.dtype not in (x.dtype, torch.float32):
        bias = bias.to(x.dtype)
    x = ops.bias_gelu(x, bias, approximate=approximate)
    for name in rest:
        x = getattr(module, name)(x)
    return x


def gated_mlp(
    module: nn.Module, gate: str, up: str, activation: str, rest: tuple[str, ...], *args: Any, **kwargs: Any
) -> Tensor:
    """rest(act(gate(x)) * up(x))."""
    if kwargs or len(args) != 1:
        return own(module, *args, **kwargs)
    x = ops.swiglu(getattr(module, gate)(args[0]), getattr(module, up)(args[0]), activation=activation)
    for name in rest:
        x = getattr(module, name)(x)
    return x


def embedding(module: Any, scaled: bool, ids: Tensor) -> Tensor:
    """ids (...) -> (..., C), times the module's embed_scale if `scaled` (Gemma's)."""
    if not _plain(ids, module.weight) or ids.dtype not in (torch.int64, torch.int32):
        return own(module, ids)
    rows = ops.embedding(ids, module.weight, padding_idx=module.padding_idx)
    return rows * module.embed_scale.to(rows.dtype) if scaled else rows


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
    """F.scaled_dot_product_attention: q (B, H, T, D) on the op where it can be, else PyTorch's."""
    why = ""
    if attn_mask is not None:
        why = "an attn_mask"
    elif query.dim() != 4 or not _plain(query, key, value) or key.shape != value.shape:
        why = "tensors that are not (B, H, T, D) and alike"
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
    """F.layer_norm over one dimension."""
    if len(normalized_shape) != 1 or not _fits((input,), {}, weight, bias):
        leave_to_torch("layer_norm", "several dimensions, or other dtypes than the op takes")
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    return ops.layer_norm(input, weight, bias, eps)


def functional_rms_norm(input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
    """F.rms_norm over one dimension."""
    if len(normalized_shape) != 1 or not _fits((input,), {}, weight):
        leave_to_torch("rms_norm", "several dimensions, or other dtypes than the op takes")
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
    """F.cross_entropy of logits (N, V) and targets (N,); the op's loss is fp32 whatever the logits."""
    usual = input.dim() == 2 and target.dim() == 1 and target.dtype == torch.int64 and _plain(input, target, weight)
    if not usual or size_average is not None or reduce is not None:
        leave_to_torch("cross_entropy", "other than (N, V) logits and (N,) class numbers")
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
    """nn.CrossEntropyLoss."""
    options: dict[str, Any] = dict(reduction=module.reduction, label_smoothing=module.label_smoothing)
    return cross_entropy(input, target, module.weight, ignore_index=module.ignore_index, **options)


def multihead_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """nn.MultiheadAttention's self-attention without weights, unmasked or causal; other calls are its own."""
    alike = query is key and key is value and query.dim() == 3 and _plain(query)
    if need_weights or not alike or key_padding_mask is not None or (attn_mask is not None) != is_causal:
        leave_to_torch(
            "attention", "MultiheadAttention with weights, padding or a mask of its own, or of several tensors"
        )
        return own(
            module, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
    y = attend(module, query, key, value, None, is_causal)
    return F.linear(y, module.out_proj.weight, module.out_proj.bias), None


def encoder_feed_forward(module: Any, approximate: str, x: Tensor) -> Tensor:
    """nn.TransformerEncoderLayer's and DecoderLayer's _ff_block with GELU."""
    last = getattr(module, "dropout3", None) or module.dropout2
    y: Tensor = gelu_mlp(module, "linear1", approximate, ("dropout", "linear2"), x)
    return last(y)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """transformers' apply_rotary_pos_emb: q (B, H, T, D), k (B, Hkv, T, D), cos and sin (B or 1, T, rotary_dim) with
    their halves alike."""
    if unsqueeze_dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # (B, T, H, D)
    half = cos.shape[-1] // 2
    wide = torch.promote_types(q.dtype, torch.float32)
    cos, sin = (t[..., :half].reshape(-1, half).to(wide) for t in (cos, sin))
    t = q.shape[1]
    positions = None
    if cos.shape[0] != t:  # each sequence has rows of its own
        positions = torch.arange(cos.shape[0], device=q.device).view(-1, t)
    q, k = ops.rope(q, k, cos, sin, positions=positions)
    return (q.transpose(1, 2), k.transpose(1, 2)) if unsqueeze_dim == 1 else (q, k)
