"""Replacements for forwards. Each gets the module as its first argument and calls fastgpt.ops or, if the op does not
cover the call, the module's own forward; a log line says so once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.core.fallback import leave_to_torch
from fastgpt.nn import GELU, _hooks
from fastgpt.nn.attention import attend, uncovered
from fastgpt.nn.embedding import uncovered as uncovered_embedding
from fastgpt.nn.norms import epsilon

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Norm:
    """Norm that a user-defined module computes: names of its parameters, and its numbers."""

    op: str
    weight: str
    bias: str | None
    eps: float
    offset: float = 0.0  # added to the weight


@dataclass(frozen=True)
class Chain:
    """Names of children in rest(act(first(x))) or rest(act(first(x)) * up(x)); `up` is empty in the former.

    act: name of the activation, empty if it is the function `kind`. sizes: (container, number of its children).
    """

    first: str
    up: str
    act: str
    kind: str
    rest: tuple[str, ...]
    sizes: tuple[tuple[str, int], ...]

    def places(self) -> dict[str, None]:
        """Return the modules whose children these are."""
        return dict.fromkeys(n.rpartition(".")[0] for n in ("", self.first, self.up, self.act, *self.rest))

    def kind_now(self, module: Any) -> str | None:
        """Return the current activation; None if the ops do not have it, it has hooks, or there are other children."""
        if any(len(child(module, name)) != n for name, n in self.sizes):
            return None
        if not self.act:
            return self.kind
        act = child(module, self.act)
        return activation(act) if _hooks.plain(act) else None


def child(module: Any, name: str) -> Any:
    """Return the module of this dotted name."""
    for part in filter(None, name.split(".")):
        module = getattr(module, part)
    return module


def own(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the module's own forward, that of its class."""
    return type(module).forward(module, *args, **kwargs)


def _leave(op: str, why: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the module's own forward, and log the reason once."""
    leave_to_torch(op, f"{type(module).__name__} {why}")
    return own(module, *args, **kwargs)


ARGUMENTS = "got arguments or dtypes that the op does not support"
ACTIVATION = "has another activation, hooks on it, or other children than when it was patched"


def _plain(*tensors: Any) -> bool:
    """Return whether these are ordinary dense tensors or None: no DTensor, no nested tensor."""
    return all(t is None or (type(t) in (Tensor, nn.Parameter) and not t.is_nested) for t in tensors)


def _fits(args: tuple[Any, ...], kwargs: dict[str, Any], width: int | None, *vectors: Any) -> bool:
    """Return whether the call has one floating-point tensor (..., width), and vectors that an op accepts with it: of
    its dtype, or fp32. width None: the width of the tensor."""
    if kwargs or len(args) != 1 or not _plain(*args, *vectors) or args[0].dim() == 0:
        return False
    x = args[0]
    shape = (x.shape[-1] if width is None else width,)
    fit = all(v is None or (v.dtype in (x.dtype, torch.float32) and v.shape == shape) for v in vectors)
    return x.dtype in FLOATS and x.shape[-1:] == shape and fit


def layer_norm(module: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Replace nn.LayerNorm: x (..., C) -> (..., C)."""
    weight, bias, shape = module.weight, module.bias, module.normalized_shape
    alike = bias is None or (weight is not None and bias.dtype == weight.dtype)
    if len(shape) != 1 or not alike or not _fits(args, kwargs, shape[0], weight, bias):
        return _leave("layer_norm", ARGUMENTS, module, args, kwargs)
    return ops.layer_norm(args[0], weight, bias, module.eps)


def rms_norm(module: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Replace nn.RMSNorm: x (..., C) -> (..., C)."""
    shape = module.normalized_shape
    if len(shape) != 1 or not _fits(args, kwargs, shape[0], module.weight):
        return _leave("rms_norm", ARGUMENTS, module, args, kwargs)
    return ops.rms_norm(args[0], module.weight, epsilon(module.eps, args[0]))


def own_norm(module: Any, norm: Norm, dims: frozenset[int], *args: Any, **kwargs: Any) -> Tensor:
    """Replace a user-defined norm: x (..., C), with one of these numbers of dimensions -> (..., C)."""
    weight = getattr(module, norm.weight)
    bias = None if norm.bias is None else getattr(module, norm.bias)
    there = weight is not None and (norm.bias is None or (bias is not None and bias.dtype == weight.dtype))
    if not there or not _fits(args, kwargs, None, weight, bias) or args[0].dim() not in dims:
        return _leave(norm.op, ARGUMENTS, module, args, kwargs)
    if norm.op == "layer_norm":
        return ops.layer_norm(args[0], weight, bias, norm.eps)
    return ops.rms_norm(args[0], weight, norm.eps, weight_offset=norm.offset)


TRANSFORMERS_ACTIVATIONS = {
    "NewGELUActivation": "gelu_tanh", "FastGELUActivation": "gelu_tanh", "GELUTanh": "gelu_tanh",
    "GELUActivation": "gelu", "SiLUActivation": "silu",
}  # fmt: skip


def activation(target: Any) -> str | None:
    """Return the kind of an activation module or function: 'gelu', 'gelu_tanh', 'silu', or None."""
    if not isinstance(target, nn.Module):
        return "gelu" if target is F.gelu else "silu" if target is F.silu else None
    forward = type(target).forward
    if forward is nn.GELU.forward or forward is GELU.forward:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(target.approximate))
    if forward is nn.SiLU.forward:
        return "silu"
    if type(target).__module__ != "transformers.activations":
        return None
    return TRANSFORMERS_ACTIVATIONS.get(type(target).__name__)


def is_plain_linear(m: nn.Module) -> bool:
    """Return whether a call of this module computes only x W + b: no adapter, no hook, no other forward."""
    return _hooks.plain(m) and (type(m).forward is nn.Linear.forward or is_conv1d(m))


def is_conv1d(m: nn.Module) -> bool:
    """Return whether the module is transformers' Conv1D, the linear layer of GPT-2 with a weight (in, out)."""
    return type(m).__module__ == "transformers.pytorch_utils" and type(m).__name__ == "Conv1D"


def gelu_mlp(module: nn.Module, chain: Chain, *args: Any, **kwargs: Any) -> Tensor:
    """Compute rest(gelu(first(x))): bias and GELU in one pass if `first` is a plain linear layer, else GELU alone."""
    if kwargs or len(args) != 1:
        return _leave("bias_gelu", ARGUMENTS, module, args, kwargs)
    kind = chain.kind_now(module)
    if kind not in ("gelu", "gelu_tanh"):
        return _leave("bias_gelu", ACTIVATION, module, args, kwargs)
    return _through(module, chain.rest, _linear_gelu(child(module, chain.first), kind, args[0]))


def _linear_gelu(first: Any, kind: str, x: Tensor) -> Tensor:
    bias = first.bias if is_plain_linear(first) else None
    if bias is None or not _plain(x, first.weight, bias):
        x, bias = first(x), None
    else:
        x = x @ first.weight if is_conv1d(first) else F.linear(x, first.weight)
    if bias is not None and bias.dtype not in (x.dtype, torch.float32):
        bias = bias.to(x.dtype)
    return ops.bias_gelu(x, bias, approximate="tanh" if kind == "gelu_tanh" else "none")


def _through(module: nn.Module, names: tuple[str, ...], x: Tensor) -> Tensor:
    for name in names:
        x = child(module, name)(x)
    return x


def gated_mlp(module: nn.Module, chain: Chain, *args: Any, **kwargs: Any) -> Tensor:
    """Compute rest(act(first(x)) * up(x))."""
    if kwargs or len(args) != 1:
        return _leave("swiglu", ARGUMENTS, module, args, kwargs)
    kind = chain.kind_now(module)
    if kind is None:
        return _leave("swiglu", ACTIVATION, module, args, kwargs)
    gate, up = child(module, chain.first)(args[0]), child(module, chain.up)(args[0])
    return _through(module, chain.rest, ops.swiglu(gate, up, activation=kind))


def embedding(module: Any, scaled: bool, *args: Any, **kwargs: Any) -> Tensor:
    """Replace an embedding: ids (...) -> (..., C), times the module's embed_scale if `scaled` (as in Gemma)."""
    usual = not kwargs and len(args) == 1 and _plain(*args, module.weight)
    if not usual or args[0].dtype not in (torch.int64, torch.int32) or uncovered_embedding(module):
        return _leave("embedding", "got arguments or options that the op does not support", module, args, kwargs)
    rows = ops.embedding(args[0], module.weight, padding_idx=module.padding_idx)
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
    """Replace F.scaled_dot_product_attention: q (B, H, T, D); calls that the op does not cover go to PyTorch."""
    why = ""
    if attn_mask is not None:
        why = "an attn_mask"
    elif query.dim() != 4 or not _plain(query, key, value) or key.shape != value.shape:
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
    if len(normalized_shape) != 1 or not _fits((input,), {}, normalized_shape[0], weight, bias):
        leave_to_torch("layer_norm", "several dimensions, or dtypes that the op does not support")
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    return ops.layer_norm(input, weight, bias, eps)


def functional_rms_norm(input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
    """Replace F.rms_norm over one dimension."""
    if len(normalized_shape) != 1 or not _fits((input,), {}, normalized_shape[0], weight):
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
    usual = input.dim() == 2 and target.dim() == 1 and target.dtype == torch.int64 and _plain(input, target, weight)
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
    """Replace nn.MultiheadAttention; calls that fastgpt.nn.MultiheadAttention does not cover run its own forward."""
    why = uncovered(module, query, key, key_padding_mask, need_weights, attn_mask, is_causal)
    if why is None and not _plain(query, key, value):
        why = "tensors that are not ordinary dense ones"
    if why is not None:
        leave_to_torch("attention", f"MultiheadAttention with {why}")
        return own(
            module, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
    y = attend(module, query, key, value, key_padding_mask, is_causal)
    return F.linear(y, module.out_proj.weight, module.out_proj.bias), None


def encoder_activation(module: Any) -> str | None:
    """Return 'gelu' or 'gelu_tanh' for the activation of a torch encoder or decoder layer; None if it is another or has
    hooks."""
    act = module.activation
    if isinstance(act, nn.Module):
        kind = activation(act) if _hooks.plain(act) else None
    else:
        options = getattr(act, "keywords", {})
        kind = activation(getattr(act, "func", act))
        kind = "gelu_tanh" if kind == "gelu" and options.get("approximate") == "tanh" else kind
    return kind if kind in ("gelu", "gelu_tanh") else None


def encoder_feed_forward(module: Any, x: Tensor) -> Tensor:
    """Replace _ff_block of nn.TransformerEncoderLayer and nn.TransformerDecoderLayer with GELU."""
    kind = encoder_activation(module)
    if kind is None:
        leave_to_torch("bias_gelu", f"{type(module).__name__} {ACTIVATION}")
        return type(module)._ff_block(module, x)  # type: ignore[no-any-return]
    y = _through(module, ("dropout", "linear2"), _linear_gelu(module.linear1, kind, x))
    last = getattr(module, "dropout3", None) or module.dropout2
    return last(y)  # type: ignore[no-any-return]


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Replace transformers' apply_rotary_pos_emb: q (B, H, T, D), k (B, Hkv, T, D), cos and sin (B or 1, T, rotary_dim)
    with two equal halves."""
    if unsqueeze_dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # (B, T, H, D)
    half = cos.shape[-1] // 2
    wide = torch.promote_types(q.dtype, torch.float32)
    cos, sin = (t[..., :half].reshape(-1, half).to(wide) for t in (cos, sin))
    t = q.shape[1]
    positions = None
    if cos.shape[0] != t:  # each sequence has its own rows
        positions = torch.arange(cos.shape[0], device=q.device).view(-1, t)
    q, k = ops.rope(q, k, cos, sin, positions=positions)
    return (q.transpose(1, 2), k.transpose(1, 2)) if unsqueeze_dim == 1 else (q, k)
