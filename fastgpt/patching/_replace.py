"""Replacements for forwards. Each gets the module as its first argument and calls fastgpt.ops or, if the op does not
cover the call, the module's own forward; a log line says so once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fastgpt import ops
from fastgpt.core.fallback import leave_to_torch
from fastgpt.nn import GELU, _hooks
from fastgpt.nn.attention import attend, uncovered
from fastgpt.nn.embedding import uncovered as uncovered_embedding
from fastgpt.nn.norms import epsilon

ORDINARY = (Tensor, nn.Parameter, FakeTensor)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Norm:
    """Norm that a user-defined module computes: names of its parameters, and its numbers."""

    op: str
    weight: str | None
    bias: str | None
    eps: float
    offset: float = 0.0  # added to the weight


@dataclass(frozen=True)
class GatedNorm:
    """RMSNorm of `groups` groups of columns with a gate: norm(x silu(gate)) if `first`, else norm(x) act(gate)."""

    weight: str
    eps: float
    groups: int
    act: str
    first: bool


@dataclass(frozen=True)
class Dropout:
    """F.dropout with probability p, in training."""

    p: float


@dataclass(frozen=True)
class Chain:
    """Names of children in rest(act(first(x))) or rest(act(first(x)) * up(x)); `up` is empty in the former.

    act: name of the activation, empty if it is the function `kind`. rest: in place of a name also a number, which
    multiplies, or Dropout. sizes: (container, number of its children). packed: which half of first(x) is the gate, if
    the other half is up(x). casts: what a linear layer in rest gets is cast to the dtype of its weight. factor:
    multiplies first(x).
    """

    first: str
    up: str
    act: str
    kind: str
    rest: tuple[str | float | Dropout, ...]
    sizes: tuple[tuple[str, int], ...]
    packed: int | None = None
    casts: bool = False
    factor: float = 1.0

    def places(self) -> dict[str, None]:
        """Return the modules whose children these are."""
        rest = (n for n in self.rest if isinstance(n, str))
        return dict.fromkeys(n.rpartition(".")[0] for n in ("", self.first, self.up, self.act, *rest))

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


def plain(*tensors: Any) -> bool:
    """Return whether these are ordinary dense tensors, torch.export's stand-ins for them, or None: no DTensor, no
    nested tensor."""
    return all(t is None or (type(t) in ORDINARY and not t.is_nested) for t in tensors)


def fits(args: tuple[Any, ...], kwargs: dict[str, Any], width: int | None, *vectors: Any) -> bool:
    """Return whether the call has one floating-point tensor (..., width), and vectors that an op accepts with it: of
    its dtype, or fp32. width None: the width of the tensor."""
    if kwargs or len(args) != 1 or not plain(*args, *vectors) or args[0].dim() == 0:
        return False
    x = args[0]
    shape = (x.shape[-1] if width is None else width,)
    fit = all(v is None or (v.dtype in (x.dtype, torch.float32) and v.shape == shape) for v in vectors)
    return x.dtype in FLOATS and x.shape[-1:] == shape and fit


def layer_norm(module: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Replace nn.LayerNorm: x (..., C) -> (..., C)."""
    weight, bias, shape = module.weight, module.bias, module.normalized_shape
    alike = bias is None or (weight is not None and bias.dtype == weight.dtype)
    if len(shape) != 1 or not alike or not fits(args, kwargs, shape[0], weight, bias):
        return _leave("layer_norm", ARGUMENTS, module, args, kwargs)
    return ops.layer_norm(args[0], weight, bias, module.eps)


def rms_norm(module: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Replace nn.RMSNorm: x (..., C) -> (..., C)."""
    shape = module.normalized_shape
    if len(shape) != 1 or not fits(args, kwargs, shape[0], module.weight):
        return _leave("rms_norm", ARGUMENTS, module, args, kwargs)
    return ops.rms_norm(args[0], module.weight, epsilon(module.eps, args[0]))


def own_norm(module: Any, norm: Norm, dims: frozenset[int], *args: Any, **kwargs: Any) -> Tensor:
    """Replace a user-defined norm: x (..., C), with one of these numbers of dimensions -> (..., C)."""
    weight: Any = None if norm.weight is None else getattr(module, norm.weight)
    bias: Any = None if norm.bias is None else getattr(module, norm.bias)
    there = (norm.weight is None or weight is not None) and (
        norm.bias is None or (bias is not None and bias.dtype == weight.dtype)
    )
    if not there or not fits(args, kwargs, None, weight, bias) or args[0].dim() not in dims:
        return _leave(norm.op, ARGUMENTS, module, args, kwargs)
    if norm.op == "layer_norm":
        weight = weight + norm.offset if norm.offset and weight is not None else weight
        return ops.layer_norm(args[0], weight, bias, norm.eps)
    return ops.rms_norm(args[0], weight, norm.eps, weight_offset=norm.offset)


def gated_norm(module: Any, norm: GatedNorm, dims: frozenset[int], *args: Any, **kwargs: Any) -> Tensor:
    """Replace a norm with a gate: x and gate (..., C), with one of these numbers of dimensions -> (..., C)."""
    given = (*args, *kwargs.values())
    alike = len(given) == 2 and plain(*given) and given[1] is not None and given[0].shape == given[1].shape
    if len(args) == 0 or not alike or not fits(given[:1], {}, None) or given[0].dim() not in dims:
        return _leave("rms_norm", ARGUMENTS, module, args, kwargs)
    return gate(norm, given[0], given[1], getattr(module, norm.weight))


def gate(norm: GatedNorm, x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """Compute a norm with a gate in fp32, as transformers does."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y, g, w = (t.to(wide) for t in (x, gate, weight))
    y = ops.swiglu(g, y) if norm.first else y
    if norm.groups == 1:
        y = ops.rms_norm(y, w, norm.eps)
    else:
        y = ops.rms_norm(y.unflatten(-1, (norm.groups, -1)), None, norm.eps).flatten(-2) * w
    if not norm.first:
        y = ops.swiglu(g, y) if norm.act == "silu" else y * torch.sigmoid(g)
    return y.to(x.dtype)


TRANSFORMERS_ACTIVATIONS = {
    "NewGELUActivation": "gelu_tanh", "FastGELUActivation": "gelu_tanh", "GELUTanh": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh", "GELUActivation": "gelu", "SiLUActivation": "silu",
    "ReLUSquaredActivation": "relu2",
}  # fmt: skip


def activation(target: Any) -> str | None:
    """Return the kind of an activation module or function: 'gelu', 'gelu_tanh', 'silu', 'relu2', or None."""
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


ALONE = ("gelu", "gelu_tanh", "relu2")  # the activations that an op computes without a gate


def activate(module: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Replace an activation: x (..., F) -> (..., F)."""
    kind = activation(module)
    if kind not in ALONE or not fits(args, kwargs, None):
        return _leave("bias_gelu", ARGUMENTS, module, args, kwargs)
    return _activated(kind, args[0])


def _activated(kind: str, x: Tensor, bias: Tensor | None = None) -> Tensor:
    if kind == "relu2":  # the op has it with a gate only: one pass over x, times 1
        return ops.swiglu(x, x.new_ones(()).expand_as(x), activation=kind)
    return ops.bias_gelu(x, bias, approximate="tanh" if kind == "gelu_tanh" else "none")


def is_plain_linear(m: nn.Module) -> bool:
    """Return whether a call of this module computes only x W + b: no adapter, no hook, no other forward."""
    return _hooks.plain(m) and (type(m).forward is nn.Linear.forward or is_conv1d(m))


def is_conv1d(m: nn.Module) -> bool:
    """Return whether the module is transformers' Conv1D, the linear layer of GPT-2 with a weight (in, out)."""
    return type(m).__module__ == "transformers.pytorch_utils" and type(m).__name__ == "Conv1D"


def gelu_mlp(module: nn.Module, chain: Chain, *args: Any, **kwargs: Any) -> Tensor:
    """Compute rest(act(first(x))): bias and GELU in one pass if `first` is a plain linear layer, else act alone."""
    if kwargs or len(args) != 1:
        return _leave("bias_gelu", ARGUMENTS, module, args, kwargs)
    kind = chain.kind_now(module)
    if kind not in ALONE:
        return _leave("bias_gelu", ACTIVATION, module, args, kwargs)
    first = child(module, chain.first)
    if chain.factor == 1:
        y = _linear_activated(first, kind, args[0])
    else:
        y = _activated(kind, first(args[0]) * chain.factor)
    return _through(module, chain.rest, y, chain.casts)


def _linear_activated(first: Any, kind: str, x: Tensor) -> Tensor:
    bias = first.bias if is_plain_linear(first) and kind != "relu2" else None
    if bias is None or not plain(x, first.weight, bias):
        return _activated(kind, first(x))
    x = x @ first.weight if is_conv1d(first) else F.linear(x, first.weight)
    return _activated(kind, x, bias if bias.dtype in (x.dtype, torch.float32) else bias.to(x.dtype))


def _through(module: nn.Module, steps: tuple[str | float | Dropout, ...], x: Tensor, casts: bool = False) -> Tensor:
    for step in steps:
        if not isinstance(step, str):
            x = F.dropout(x, step.p, module.training) if isinstance(step, Dropout) else x * step
            continue
        following = child(module, step)
        weight = getattr(following, "weight", None) if casts else None
        if isinstance(weight, Tensor) and weight.is_floating_point():
            x = x.to(weight.dtype)
        x = following(x)
    return x


def gated_mlp(module: nn.Module, chain: Chain, *args: Any, **kwargs: Any) -> Tensor:
    """Compute rest(act(first(x)) * up(x))."""
    if kwargs or len(args) != 1:
        return _leave("swiglu", ARGUMENTS, module, args, kwargs)
    kind = chain.kind_now(module)
    if kind is None:
        return _leave("swiglu", ACTIVATION, module, args, kwargs)
    gate = child(module, chain.first)(args[0])
    gate = gate if chain.factor == 1 else gate * chain.factor
    if chain.packed == 0:
        up = None
    elif chain.packed == 1:
        up, gate = gate.chunk(2, -1)
    else:
        up = child(module, chain.up)(args[0])
    return _through(module, chain.rest, ops.swiglu(gate, up, activation=kind), chain.casts)


def expert_gate(module: Any, gate_up: Tensor) -> Tensor:
    """Replace _apply_gate of transformers' experts: (S, 2 F), gate first -> (S, F)."""
    watched = isinstance(module.act_fn, nn.Module) and not _hooks.plain(module.act_fn)
    kind = None if watched else activation(module.act_fn)
    if kind is None or not fits((gate_up,), {}, None):
        leave_to_torch("swiglu", f"{type(module).__name__} {ACTIVATION}")
        return type(module)._apply_gate(module, gate_up)  # type: ignore[no-any-return]
    return ops.swiglu(gate_up, activation=kind)


def embedding(module: Any, scaled: bool, *args: Any, **kwargs: Any) -> Tensor:
    """Replace an embedding: ids (...) -> (..., C), times the module's embed_scale if `scaled` (as in Gemma)."""
    usual = not kwargs and len(args) == 1 and plain(*args, module.weight)
    if not usual or args[0].dtype not in (torch.int64, torch.int32) or uncovered_embedding(module):
        return _leave("embedding", "got arguments or options that the op does not support", module, args, kwargs)
    rows = ops.embedding(args[0], module.weight, padding_idx=module.padding_idx)
    if not scaled:
        return rows
    scale = module.embed_scale
    return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)


def rows(module: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Replace an embedding that computes which rows it returns, such as one of positions -> (..., C).

    Its own forward runs on a copy whose rows are their own numbers, which a compiler cannot make.
    """
    weight = module.weight
    if not plain(weight) or torch.compiler.is_compiling():
        return _leave("embedding", "is compiled, or its weight is not an ordinary tensor", module, args, kwargs)
    numbered = object.__new__(type(module))
    table = torch.arange(len(weight), device=weight.device)[:, None]
    numbered.__dict__.update({**module.__dict__, "_parameters": {}, "weight": table})
    taken = type(module).forward(numbered, *args, **kwargs)
    return ops.embedding(taken[..., 0], weight, padding_idx=module.padding_idx)


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
    if why is None and not plain(query, key, value):
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
    y = _through(module, ("dropout", "linear2"), _linear_activated(module.linear1, kind, x))
    last = getattr(module, "dropout3", None) or module.dropout2
    return last(y)  # type: ignore[no-any-return]
