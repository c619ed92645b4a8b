"""Recognise MLPs by tracing their forward, experts by running their gate, and activations that stand alone."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastgpt.ops.swiglu import swiglu_ref
from fastgpt.patching import _replace as replace
from fastgpt.patching._recognise import CONTAINERS, Found, name_of
from fastgpt.patching._replace import activation
from fastgpt.patching._settings import run_apart, settings, writes_globals

MAX_CHILDREN = 8
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Shallow(fx.Tracer):
    """Tracer that makes every child module and every buffer one node: changes of these are recorded, not executed.

    Where the code asks whether a dtype equals another (T5 casts to that of the next weight), the answer is `alike`.
    """

    proxy_buffer_attributes = True

    def __init__(self, alike: bool) -> None:
        super().__init__()
        self.alike, self.asked = alike, list[fx.Node]()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if isinstance(attr_val, nn.Parameter):  # code may ask for its type or dtype; used as a number, it is a node
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: fx.Proxy) -> bool:
        node = obj.node
        of_dtypes = all(isinstance(a, torch.dtype) or _is_dtype(a) for a in node.args)
        if node.op != "call_function" or node.target not in (operator.eq, operator.ne) or not of_dtypes:
            return super().to_bool(obj)
        self.asked.append(node)
        return self.alike == (node.target is operator.eq)


def _is_dtype(node: Any) -> bool:
    """Return whether a node is the dtype of a tensor."""
    return isinstance(node, fx.Node) and node.target is getattr and node.args[1:] == ("dtype",)


def _traced(module: nn.Module, training: bool, alike: bool) -> tuple[fx.Graph, bool, str]:
    """Return the graph of a module's forward without its questions about dtypes, whether there were any, and how the
    forward depends on more than its argument."""
    tracer = _Shallow(alike)
    graph, why = run_apart(module, tracer.trace, training)
    for node in dict.fromkeys(tracer.asked):
        if not node.users:
            dtypes = [a for a in node.args if isinstance(a, fx.Node)]
            graph.erase_node(node)
            for d in dtypes:
                if not d.users:
                    graph.erase_node(d)
    return graph, bool(tracer.asked), why


def mlp(module: nn.Module) -> Found | None:
    """Recognise down(act(up(x))) and down(act(gate(x)) * up(x)), with gate and up in two linear layers or in one, each
    followed by single-input modules, dropout or factors; and experts."""
    what = name_of(module)
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return _encoder_mlp(module)
    if type(module).__module__.startswith("torch.nn.") and type(module) is not nn.Sequential:
        return None
    if hasattr(type(module), "_apply_gate"):
        return _experts(module)
    children = dict(module.named_children())
    acts = tuple(n for n, m in children.items() if activation(m))
    own = any(p is not None and p.dim() > 1 for p in module._parameters.values())
    if own and (acts or any(map(_is_other_activation, children.values()))) and not _convolves(children):
        return Found("mlp", what, why="it has weights of its own", covers=acts)
    if not 2 <= len(children) <= MAX_CHILDREN or _convolves(children):
        return None
    names = getattr(getattr(type(module).forward, "__code__", None), "co_names", ())
    active = bool(acts) or bool({"gelu", "silu"} & set(names))
    linears = sum(map(_is_linear, children.values()))
    others = [name_of(m) for m in children.values() if _is_other_activation(m)]
    if others and not active and linears >= 2:
        return Found("mlp", what, why=f"the ops have no {others[0]}")
    if not (active or linears >= 2):
        return None
    if module._parameters:
        return Found("mlp", what, why="it has weights of its own", covers=acts) if active else None
    found = [_trace_mlp(module, what, training, active) for training in (False, True)]
    if found[0] != found[1]:
        return Found("mlp", what, why="its forward differs in training", covers=acts)
    first = found[0]
    return first if first is None or first.op else dataclasses.replace(first, covers=acts)


def _convolves(children: dict[str, nn.Module]) -> bool:
    """Return whether a module is a mixer rather than an MLP."""
    return any(isinstance(m, CONVOLUTIONS) for m in children.values())


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or replace.is_conv1d(module) or hasattr(module, "base_layer")


def _is_other_activation(module: nn.Module) -> bool:
    """Return whether a module is an activation that no op has."""
    place = type(module).__module__
    known = place in ("torch.nn.modules.activation", "transformers.activations")
    return known and not isinstance(module, nn.MultiheadAttention) and activation(module) is None


def _trace_mlp(module: nn.Module, what: str, training: bool, active: bool) -> Found | None:
    """Recognise an MLP by its forward in this mode."""
    try:
        graph, asked, why = _traced(module, training, True)
        other = _traced(module, training, False)[0] if asked else None
    except Exception:  # control flow over values, several arguments: not a plain chain
        return Found("mlp", what, why="its forward cannot be traced") if active else None
    found = _match(module, what, graph, training)
    if found is None or not found.op:
        return found
    if other is not None:  # it may only cast to the dtype of the next weight
        casting = _match(module, what, other, training, casts=True)
        chain = dataclasses.replace(found.arguments[0], casts=True)
        found = dataclasses.replace(found, arguments=(chain,))
        if casting != found:
            return Found("mlp", what, why="its forward depends on dtypes")
    why = "its forward sets a global variable" if writes_globals(type(module)) else why
    return Found("mlp", what, why=why) if why else found


def _encoder_mlp(module: Any) -> Found | None:
    if replace.encoder_activation(module) is None:
        return Found("mlp", name_of(module), why="its activation is not GELU")
    return Found("mlp", name_of(module), "bias_gelu", attribute="_ff_block", call=replace.encoder_feed_forward)


def _kind(module: nn.Module, node: fx.Node) -> str | None:
    """Return which activation a node is."""
    if node.op == "call_module":
        return activation(module.get_submodule(str(node.target)))
    kind = activation(node.target) if node.op == "call_function" else None
    return "gelu_tanh" if kind == "gelu" and node.kwargs.get("approximate", "none") == "tanh" else kind


def _match(module: nn.Module, what: str, graph: fx.Graph, training: bool, casts: bool = False) -> Found | None:
    """Recognise an MLP in the graph of its forward in this mode; casts: with casts to the dtype of the next linear
    layer."""
    acts = [n for n in graph.nodes if n.op in ("call_module", "call_function") and _kind(module, n)]
    if len(acts) == 1:
        _erase_fp32(graph, acts[0])
    nodes = [n for n in graph.nodes if n.op != "placeholder" or n.users]
    if nodes[0].op != "placeholder" or len(acts) != 1:
        return None
    x, act = nodes[0], acts[0]
    kind = _kind(module, act)
    assert kind is not None
    named = (str(act.target) if act.op == "call_module" else "", kind)
    before = act.args[0]
    scaled = _scaled(before)
    linear, factor = scaled or (before, 1.0)
    half = _half(linear)
    first = linear if half is None else half[0]
    if not (isinstance(first, fx.Node) and _is_call(first, x)) or (half and scaled):
        return Found("mlp", what, why="its activation does not follow a linear layer")
    (after,) = act.users if len(act.users) == 1 else (None,)
    seen = {x, before, linear, act, first}
    if after is not None and _is_product(after) and not _scaled(after):
        ups = [n for n in after.args if n is not act]
        up = ups[0] if len(ups) == 1 else None
        gated = _gate(linear, half, up, x)
        if gated is None:
            return Found("mlp", what, why="its gate does not multiply a linear layer of the same input")
        rest = _chain(module, after, seen | gated | {up, after}, nodes, training, casts)
        roles = (str(first.target), "" if half else str(up.target), *named)  # type: ignore[union-attr]
        op, call = "swiglu", replace.gated_mlp
    else:
        rest = None if half else _chain(module, act, seen, nodes, training, casts)
        if kind == "silu":
            return Found("mlp", what, why="bias_gelu has no SiLU")
        roles = (str(first.target), "", *named)
        op, call = ("swiglu" if kind == "relu2" else "bias_gelu"), replace.gelu_mlp  # type: ignore[assignment]
    if rest is None:
        return Found("mlp", what, why="more than a chain of modules follows its activation")
    children = replace.Chain(*roles, rest, (), half[2] if half else None, casts, factor)
    sizes = [(n, len(m)) for n in children.places() if isinstance(m := replace.child(module, n), CONTAINERS)]
    chain = dataclasses.replace(children, sizes=tuple(sizes))
    covers = (named[0],) if named[0] else ()
    return Found("mlp", what, op, call=call, arguments=(chain,), settings=settings(module), covers=covers)


def _is_product(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (operator.mul, torch.mul)


def _scaled(node: Any) -> tuple[fx.Node, float] | None:
    """Return (other node, number) of a node that is the product of these."""
    if not isinstance(node, fx.Node) or not _is_product(node):
        return None
    numbers = [float(a) for a in node.args if isinstance(a, (int, float))]
    others = [a for a in node.args if isinstance(a, fx.Node)]
    return (others[0], numbers[0]) if len(numbers) == len(others) == 1 else None


def _dropout(node: fx.Node, training: bool) -> replace.Dropout | None:
    """Return what F.dropout does in this mode; None if the node is another call."""
    if node.op != "call_function" or node.target is not F.dropout:
        return None
    given = {**dict(zip(("input", "p", "training", "inplace"), node.args)), **node.kwargs}
    usual = given.get("training", True) is training and isinstance(given.get("p", 0.5), (int, float))
    return replace.Dropout(float(given.get("p", 0.5))) if usual else None  # type: ignore[arg-type]


def _erase_fp32(graph: fx.Graph, act: fx.Node) -> None:
    """Erase casts of the outputs of linear layers to fp32 for an activation and its product, and the cast of the result
    to the dtype that they had: the ops compute in this way."""
    wide = [n for n in graph.nodes if n.op == "call_method" and n.target == "float"]
    product = next((u for u in act.users if _is_product(u)), act)
    backs = [u for u in product.users if u.op == "call_method" and u.target == "to" and len(u.args) == 2]
    before = all(n.args[0].op == "call_module" and set(n.users) <= {act, product} for n in wide)
    if act.args[0] not in wide or not before or len(product.users) != 1 or len(backs) != 1 or backs[0].kwargs:
        return
    dtype: Any = backs[0].args[1]
    if not _is_dtype(dtype) or dtype.args[0] not in [n.args[0] for n in wide]:
        return
    for cast in (*wide, backs[0]):
        cast.replace_all_uses_with(cast.args[0])
        graph.erase_node(cast)
    graph.erase_node(dtype)


def _half(node: Any) -> tuple[fx.Node, fx.Node, int] | None:
    """Return (whole, its chunks, which one) of a node that is one of the two halves of another's last dimension."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target is not operator.getitem:
        return None
    chunks, i = node.args
    if not isinstance(chunks, fx.Node) or i not in (0, 1):
        return None
    called = chunks.target in ("chunk", torch.chunk)
    dim = chunks.kwargs.get("dim", chunks.args[2] if len(chunks.args) > 2 else 0)
    two = chunks.args[1] if len(chunks.args) > 1 else chunks.kwargs.get("chunks")
    usual = called and dim == -1 and two == 2 and isinstance(chunks.args[0], fx.Node)
    return (chunks.args[0], chunks, i) if usual else None  # type: ignore[return-value]


def _gate(before: Any, half: Any, up: Any, x: fx.Node) -> set[fx.Node] | None:
    """Return the nodes between x and act(before) * up; None if up is no linear layer of x, or not the other half."""
    if half is None:
        return set() if isinstance(up, fx.Node) and _is_call(up, x) else None
    other = _half(up)
    return {half[1]} if other is not None and other[1] is half[1] and other[2] != half[2] else None


def _is_call(node: fx.Node, x: fx.Node) -> bool:
    """Return whether node is a child module called on x alone."""
    return node.op == "call_module" and node.args == (x,) and not node.kwargs


def _chain(
    module: nn.Module, node: fx.Node, seen: set[Any], nodes: list[fx.Node], training: bool, casts: bool
) -> tuple[str | float | replace.Dropout, ...] | None:
    """Return the steps of `Chain.rest` from node to the output; None if the graph has other nodes."""
    steps: list[str | float | replace.Dropout] = []
    while len(node.users) == 1:
        (user,) = node.users
        seen.add(user)
        if user.op == "output":
            return tuple(steps) if user.args == (node,) and seen == set(nodes) else None
        if scaled := _scaled(user):
            steps.append(scaled[1])
        elif dropout := _dropout(user, training):
            steps.append(dropout)
        elif _is_call(user, node):
            steps.append(str(user.target))
        elif not (casts and _is_cast(module, user, node)):
            return None
        node = user
    return None


def _is_cast(module: nn.Module, node: fx.Node, x: fx.Node) -> bool:
    """Return whether node casts x to the dtype of the weight of the only module that is called on it."""
    if node.op != "call_method" or node.target != "to" or node.kwargs or len(node.args) != 2 or node.args[0] is not x:
        return False
    users = [u for u in node.users if u.op == "call_module"]
    weights = [getattr(module.get_submodule(str(u.target)), "weight", None) for u in users]
    return len(weights) == len(node.users) == 1 and getattr(weights[0], "dtype", None) == node.args[1]


@torch.inference_mode(False)
@torch.no_grad()
def _experts(module: Any) -> Found:
    """Recognise experts of transformers whose grouped products are separated by act(gate) * up."""
    what, covers = name_of(module), ("act_fn",) if isinstance(getattr(module, "act_fn", None), nn.Module) else ()
    if getattr(module.config, "_experts_implementation", None) == "eager":
        return Found("mlp", what, why="its experts run one by one (experts_implementation is 'eager')")
    kind = activation(getattr(module, "act_fn", None))
    if not module.has_gate:
        why = "" if kind in replace.ALONE else "the ops have no activation like that of its experts"
        return Found("mlp", what, why=why or "its experts have no gate", covers=covers if not why else ())
    x = torch.randn(3, 16, generator=torch.Generator("cpu").manual_seed(0), device="cpu", dtype=torch.float32) * 4
    try:
        y: Tensor = run_apart(module, lambda bare: type(module)._apply_gate(bare, x), False)[0]
    except Exception:  # its gate needs more than gate and up
        y = x
    if kind is None or y.shape != (3, 8) or not torch.allclose(y, swiglu_ref(x, activation=kind), atol=1e-5):
        return Found("mlp", what, why="its experts' gate is not act(gate) * up")
    kept = settings(module, "_apply_gate")
    return Found("mlp", what, "swiglu", attribute="_apply_gate", call=replace.expert_gate, settings=kept, covers=covers)


def activation_alone(module: nn.Module) -> Found | None:
    """Recognise an activation of transformers that an op has by itself; an MLP that covers it takes precedence."""
    if type(module).__module__ != "transformers.activations" or (kind := activation(module)) not in replace.ALONE:
        return None
    op = "swiglu" if kind == "relu2" else "bias_gelu"
    return Found("mlp", name_of(module), op, call=replace.activate)
