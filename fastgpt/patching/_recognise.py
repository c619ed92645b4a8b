"""What a module is, by what it computes and not by its name: norms are run on a few small rows, MLPs are traced.

So a norm or MLP of a model nobody has heard of is found as surely as Llama's, and one that only looks like it is not.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastgpt.nn.embedding import uncovered
from fastgpt.ops.layer_norm import layer_norm_ref
from fastgpt.ops.rms_norm import rms_norm_ref
from fastgpt.patching import _replace as replace

EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12)
MAX_CHILDREN = 8


@dataclass(frozen=True)
class Found:
    """Something in a module that an op can take the place of (`op`), or not (`op` empty, and `why`).

    `call` is put under `attribute` of the instance, with the module and `arguments` before the call's own; for a
    function that a method calls by name, `function` and what takes its place are given instead.
    """

    part: str
    what: str
    op: str = ""
    why: str = ""
    attribute: str = "forward"
    call: Callable[..., Any] | None = None
    arguments: tuple[Any, ...] = ()
    function: Any = None


def name_of(module: nn.Module) -> str:
    """Its class's name."""
    return type(module).__name__


def norm(module: nn.Module) -> Found | None:
    """nn.LayerNorm, nn.RMSNorm, or any module that computes the same."""
    forward = type(module).forward
    what = name_of(module)
    if forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        if len(module.normalized_shape) != 1:  # type: ignore[arg-type]
            return Found("norm", what, why=f"it normalises over {len(module.normalized_shape)} dimensions")  # type: ignore[arg-type]
        if forward is nn.LayerNorm.forward:
            return Found("norm", what, "layer_norm", call=replace.layer_norm, arguments=(module.eps,))
        return Found("norm", what, "rms_norm", call=replace.rms_norm, arguments=(module.eps, 0.0))
    if "norm" not in what.lower() or type(module).__module__.startswith("torch.nn."):
        return None
    made = {n: p for n, p in module._parameters.items() if p is not None}
    leaf = not module._modules and not module._buffers
    if not leaf or "weight" not in made or not made.keys() <= {"weight", "bias"} or made["weight"].dim() != 1:
        return None if module._modules else Found("norm", what, why="it has other parameters than weight and bias")
    formula = _norm_formula(module)
    if formula is None:
        return Found("norm", what, why="it computes neither LayerNorm nor RMSNorm")
    op, arguments = formula
    return Found("norm", what, op, call=getattr(replace, op), arguments=arguments)


def _norm_formula(module: Any) -> tuple[str, tuple[Any, ...]] | None:
    """(op, its arguments) that give what this module's class computes with these settings, from a run in fp32."""
    width = module.weight.shape[0]
    g = torch.Generator("cpu").manual_seed(0)
    # means and scales apart; the smallest rows tell the epsilons apart
    x = torch.randn(4, width, generator=g, device="cpu") + 0.5
    x *= torch.tensor([[1e-4], [1e-2], [1.0], [30.0]], device="cpu")
    made: dict[str, Any] = {
        n: torch.randn(width, generator=g, device="cpu") for n, p in module._parameters.items() if p is not None
    }
    y = _try(module, x, _parameters={n: made.get(n) for n in module._parameters})
    if y is None or y.shape != x.shape:
        return None
    own_eps = [getattr(module, n) for n in ("eps", "variance_epsilon", "epsilon", "norm_eps") if hasattr(module, n)]
    for eps in (*(e for e in own_eps if isinstance(e, float)), *EPSILONS):
        for offset in (0.0, 1.0):
            if "bias" not in made and _close(y, rms_norm_ref(x, made["weight"], eps, weight_offset=offset)):
                return "rms_norm", (eps, offset)
        if _close(y, layer_norm_ref(x, made["weight"], made.get("bias"), eps)):
            return "layer_norm", (eps,)
    return None


def _try(module: nn.Module, x: torch.Tensor, **attributes: Any) -> torch.Tensor | None:
    """What module's class computes of x alone with these attributes; None if nothing, or not a tensor."""
    bare = bare_copy(module)
    bare.__dict__ |= attributes
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            y = type(module).forward(bare, x)
    except Exception:  # it wants other arguments, or looks at what a bare copy lacks
        return None
    return y if isinstance(y, torch.Tensor) else None


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


def activation(node_target: Any) -> str | None:
    """'gelu', 'gelu_tanh', 'silu', or None, of an activation module or function."""
    if isinstance(node_target, nn.GELU):
        return "gelu" if node_target.approximate == "none" else "gelu_tanh"
    if isinstance(node_target, nn.SiLU):
        return "silu"
    functions = {F.gelu: "gelu", F.silu: "silu"}
    if node_target in functions:
        return functions[node_target]
    if type(node_target).__module__ != "transformers.activations":
        return None
    names = {"NewGELUActivation": "gelu_tanh", "FastGELUActivation": "gelu_tanh", "GELUTanh": "gelu_tanh"}
    names |= {"GELUActivation": "gelu", "SiLUActivation": "silu"}
    return names.get(type(node_target).__name__)


class _Shallow(fx.Tracer):
    """Every child module is one node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def mlp(module: nn.Module) -> Found | None:
    """down(gelu(up(x))), or down(act(gate(x)) * up(x)), each with single-input modules (dropout) behind."""
    what = name_of(module)
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return _encoder_mlp(module)
    if type(module).__module__.startswith("torch.nn.") and type(module) is not nn.Sequential:
        return None
    children = dict(module.named_children())
    names = getattr(getattr(type(module).forward, "__code__", None), "co_names", ())
    active = any(activation(m) for m in children.values()) or bool({"gelu", "silu"} & set(names))
    if not 2 <= len(children) <= MAX_CHILDREN or not (active or sum(map(_is_linear, children.values())) >= 2):
        return None
    try:
        graph = _Shallow().trace(bare_copy(module))
    except Exception:  # control flow over values, several arguments: not a plain chain
        return Found("mlp", what, why="its forward cannot be traced") if active else None
    return _match(module, what, graph)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or replace.is_conv1d(module) or hasattr(module, "base_layer")


def bare_copy(module: nn.Module) -> Any:
    """A module of the same class and settings, without hooks, to run once: what its forward sets stays on the copy."""
    bare = object.__new__(type(module))
    nn.Module.__init__(bare)
    hooks = {n: v for n, v in bare.__dict__.items() if "hooks" in n}
    kept = {n: dict(v) if isinstance(v, dict) else v for n, v in module.__dict__.items()}
    bare.__dict__.update({**kept, **hooks})
    return bare


def _encoder_mlp(module: Any) -> Found | None:
    act = module.activation
    kind = activation(act) or activation(getattr(act, "func", None))
    if kind is None or "gelu" not in kind:
        return Found("mlp", name_of(module), why="its activation is not GELU")
    approximate = "tanh" if kind == "gelu_tanh" or getattr(act, "keywords", {}).get("approximate") == "tanh" else "none"
    call = replace.encoder_feed_forward
    return Found("mlp", name_of(module), "bias_gelu", attribute="_ff_block", call=call, arguments=(approximate,))


def _kind(module: nn.Module, node: fx.Node) -> str | None:
    """Which activation a node is."""
    if node.op == "call_module":
        return activation(module.get_submodule(str(node.target)))
    kind = activation(node.target) if node.op == "call_function" else None
    return "gelu_tanh" if kind == "gelu" and node.kwargs.get("approximate", "none") == "tanh" else kind


def _match(module: nn.Module, what: str, graph: fx.Graph) -> Found | None:
    nodes = [n for n in graph.nodes if n.op != "placeholder" or n.users]
    acts = [n for n in nodes if n.op in ("call_module", "call_function") and _kind(module, n)]
    if nodes[0].op != "placeholder" or len(acts) != 1:
        return None
    x, act = nodes[0], acts[0]
    kind = _kind(module, act)
    assert kind is not None
    before = act.args[0]
    if not (isinstance(before, fx.Node) and _is_call(before, x)):
        return Found("mlp", what, why="its activation does not follow a linear layer")
    (after,) = act.users if len(act.users) == 1 else (None,)
    seen = {x, before, act}
    if after is not None and after.op == "call_function" and after.target in (operator.mul, torch.mul):
        ups = [n for n in after.args if n is not act]
        if len(ups) != 1 or not isinstance(ups[0], fx.Node) or not _is_call(ups[0], x):
            return Found("mlp", what, why="its gate does not multiply a linear layer of the same input")
        rest = _chain(after, seen | {ups[0], after}, nodes)
        roles: tuple[Any, ...] = (str(before.target), str(ups[0].target), kind)
        op, call = "swiglu", replace.gated_mlp
    else:
        rest = _chain(act, seen, nodes)
        if kind == "silu":
            return Found("mlp", what, why="bias_gelu has no SiLU")
        roles = (str(before.target), "tanh" if kind == "gelu_tanh" else "none")
        op, call = "bias_gelu", replace.gelu_mlp  # type: ignore[assignment]
    if rest is None:
        return Found("mlp", what, why="more than a chain of modules follows its activation")
    return Found("mlp", what, op, call=call, arguments=(*roles, rest))


def _is_call(node: fx.Node, x: fx.Node) -> bool:
    """Whether node is a child module called on x alone."""
    return node.op == "call_module" and node.args == (x,) and not node.kwargs


def _chain(node: fx.Node, seen: set[fx.Node], nodes: list[fx.Node]) -> tuple[str, ...] | None:
    """Names of the single-input child modules from node to the output; None if there is anything else in the graph."""
    names: list[str] = []
    while len(node.users) == 1:
        (user,) = node.users
        seen.add(user)
        if user.op == "output":
            return tuple(names) if user.args == (node,) and seen == set(nodes) else None
        if not _is_call(user, node):
            return None
        names.append(str(user.target))
        node = user
    return None


def embedding(module: nn.Module) -> Found | None:
    """nn.Embedding, or a subclass that multiplies rows by `embed_scale`, without options that ops.embedding lacks."""
    if not isinstance(module, nn.Embedding):
        return None
    what, plain = name_of(module), type(module).forward is nn.Embedding.forward
    if not plain and not _is_scaled_embedding(module):
        return Found("embedding", what, why="its forward is its own")
    if extra := uncovered(module):
        return Found("embedding", what, why=f"it has {' and '.join(extra)}")
    return Found("embedding", what, "embedding", call=replace.embedding, arguments=(not plain,))


def _is_scaled_embedding(module: nn.Embedding) -> bool:
    """Whether weight[ids] times the buffer embed_scale is what its class computes, from a run on a few rows."""
    if module._parameters.keys() != {"weight"} or module._buffers.keys() != {"embed_scale"}:
        return False
    weight = torch.randn(4, 3, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    scale, ids = torch.tensor(1.7, device="cpu"), torch.tensor([[2, 0, 3]], device="cpu")
    y = _try(module, ids, _parameters={"weight": weight}, _buffers={"embed_scale": scale}, padding_idx=None)
    return y is not None and torch.equal(y, weight[ids] * scale)


def loss(module: nn.Module) -> Found | None:
    """nn.CrossEntropyLoss."""
    if type(module).forward is not nn.CrossEntropyLoss.forward:
        return None
    return Found("loss", name_of(module), "cross_entropy", call=replace.cross_entropy_loss)


def attention(module: Any) -> Found | None:
    """nn.MultiheadAttention."""
    if type(module).forward is not nn.MultiheadAttention.forward:
        return None
    what = name_of(module)
    if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        return Found("attention", what, why="its keys have another width or extra entries")
    return Found("attention", what, "attention", call=replace.multihead_attention)


RECOGNISERS: tuple[Callable[[Any], Found | None], ...] = (norm, mlp, attention, embedding, loss)
