"""Recognise modules by what they compute, not by their names: run norms on a few small rows, and trace MLPs.

So a norm or MLP of an unknown model is found as reliably as one of Llama, and a module that only looks like one is not.
Each module runs in training and in evaluation mode; one that computes different things in these modes, draws random
numbers or changes itself is left as it is.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastgpt.nn.embedding import uncovered
from fastgpt.ops.layer_norm import layer_norm_ref
from fastgpt.ops.rms_norm import rms_norm_ref
from fastgpt.patching import _replace as replace
from fastgpt.patching._replace import Norm, activation
from fastgpt.patching._settings import Settings, run_apart, settings, writes_globals

EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12)
MAX_CHILDREN = 8
MAX_WIDTH = 2**18  # a wider vector does not belong to a norm (flat parameters of FSDP)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # their forward, or a loop, runs all children


@dataclass(frozen=True)
class Found:
    """Something in a module that `op` can replace, or cannot, for the reason `why` (then `op` is empty).

    `call` becomes `attribute` of the instance and is called with the module, `arguments` and the arguments of the call,
    as long as the module's `settings` do not change. If a method calls `function` by name, `call` replaces that
    function instead.
    """

    part: str
    what: str
    op: str = ""
    why: str = ""
    attribute: str = "forward"
    call: Callable[..., Any] | None = None
    arguments: tuple[Any, ...] = ()
    function: Any = None
    settings: Settings = ()


def name_of(module: nn.Module) -> str:
    """Return the name of the module's class."""
    return type(module).__name__


def norm(module: nn.Module) -> Found | None:
    """Recognise nn.LayerNorm, nn.RMSNorm, or any module that computes the same."""
    forward = type(module).forward
    what = name_of(module)
    if forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        if len(module.normalized_shape) != 1:  # type: ignore[arg-type]
            return Found("norm", what, why=f"it normalises over {len(module.normalized_shape)} dimensions")  # type: ignore[arg-type]
        if forward is nn.LayerNorm.forward:
            return Found("norm", what, "layer_norm", call=replace.layer_norm)
        return Found("norm", what, "rms_norm", call=replace.rms_norm)
    if type(module).__module__.startswith("torch.nn.") or module._modules:
        return None
    found = _own_norm(module)
    if isinstance(found, Found):
        return found
    # if it is not a norm, report it only if its name says that it is one
    return Found("norm", what, why=found) if "norm" in what.lower() else None


def _own_norm(module: nn.Module) -> Found | str:
    """Recognise a norm with one or two vectors in a user-defined leaf module; else return why it is none."""
    vectors = {n: p for n, p in module._parameters.items() if p is not None}
    shapes = [tuple(p.shape) for p in vectors.values()]
    tensors = module._buffers or any(isinstance(v, Tensor) for v in vars(module).values())
    alike = len(shapes) in (1, 2) and len(set(shapes)) == 1 and len(shapes[0]) == 1
    if tensors or not alike or not 2 <= shapes[0][0] <= MAX_WIDTH:
        return "it has other parameters than weight and bias"
    if writes_globals(type(module)):
        return "its forward sets a global variable"
    return _probe_norm(module, tuple(vectors), shapes[0][0])


@torch.inference_mode(False)
@torch.enable_grad()
def _probe_norm(module: Any, names: tuple[str, ...], width: int) -> Found | str:
    """Run the module's class in fp32 with its settings, and return the norm that it computes, or why it is none."""
    g = torch.Generator("cpu").manual_seed(0)
    options: dict[str, Any] = dict(generator=g, device="cpu", dtype=torch.float32)
    made = {n: torch.randn(width, **options).requires_grad_() for n in names}
    parameters = {n: made.get(n) for n in module._parameters}
    # rows of different means and scales; the smallest rows distinguish the epsilons
    rows = torch.randn(4, width, **options) + 0.5
    rows = rows * rows.new_tensor([[1e-7], [1e-4], [1e-2], [30.0]])
    formula: Norm | None = None
    dims, other = set[int](), "it computes neither LayerNorm nor RMSNorm"
    for shape in ((4, width), (2, 2, width), (2, 1, 2, width)):
        x = rows.view(shape).detach().requires_grad_()
        runs = [_try(module, x, training, _parameters=parameters) for training in (False, True)]
        ys = [y for y, _ in runs if y is not None]
        if not ys:
            continue
        formula = formula or next((f for y in ys for f in _candidates(module, names) if _is_norm(f, x, y, made)), None)
        if formula is None:
            return other
        if why := runs[0][1] or runs[1][1]:
            return why
        if len(ys) < 2 or not all(_is_norm(formula, x, y, made) for y in ys):
            return f"it computes {formula.op} only in some runs (in training, or for some numbers of dimensions)"
        dims.add(len(shape))
    if formula is None:
        return other
    arguments = (formula, frozenset(dims))
    kept = settings(module)
    return Found("norm", name_of(module), formula.op, call=replace.own_norm, arguments=arguments, settings=kept)


def _candidates(module: Any, names: tuple[str, ...]) -> Iterator[Norm]:
    """Yield every norm over parameters of these names; epsilons found in the module's attributes are tried first."""
    own = [v for v in {**vars(type(module)), **vars(module)}.values() if isinstance(v, float) and v > 0]
    for eps in dict.fromkeys((*own, *EPSILONS)):
        if len(names) == 1:
            yield from (Norm("rms_norm", names[0], None, eps, offset) for offset in (0.0, 1.0))
            yield Norm("layer_norm", names[0], None, eps)
        else:
            yield from (Norm("layer_norm", w, b, eps) for w, b in (names, names[::-1]))


def _is_norm(norm: Norm, x: Tensor, y: Tensor, made: dict[str, Tensor]) -> bool:
    """Return whether y is this norm of x, with the same gradients."""
    weight, bias = made[norm.weight], None if norm.bias is None else made[norm.bias]
    if norm.op == "rms_norm":
        exact = rms_norm_ref(x, weight, norm.eps, weight_offset=norm.offset)
    else:
        exact = layer_norm_ref(x, weight, bias, norm.eps)
    if not y.requires_grad or not _close(y, exact, 2e-5):
        return False
    dy = torch.linspace(-1, 2, y.numel(), device="cpu", dtype=torch.float32).view(y.shape)
    inputs = [x, *made.values()]
    theirs, ours = (
        torch.autograd.grad(t, inputs, dy, retain_graph=True, allow_unused=True, materialize_grads=True)
        for t in (y, exact)
    )
    return all(_close(a, b, 1e-3) for a, b in zip(theirs, ours))


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Return whether every row of a is close to its row of b, relative to the largest element of the row."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a - b).abs().amax(-1) <= tolerance * b.abs().amax(-1)).all())


def _try(module: nn.Module, x: Tensor, training: bool, **attributes: Any) -> tuple[Tensor | None, str]:
    """Run the module's class on x alone with these attributes; return its result, None if that is not a tensor, and
    what else it does."""

    def call(bare: Any) -> Any:
        with torch.autocast("cpu", enabled=False), torch.device("cpu"):
            return type(module).forward(bare, x)

    try:
        y, why = run_apart(module, call, training, **attributes)
    except Exception:  # it expects other arguments, or reads what a bare copy lacks
        return None, ""
    return (y, why) if isinstance(y, Tensor) else (None, "")


class _Shallow(fx.Tracer):
    """Tracer that makes every child module and every buffer one node: changes of these are recorded, not executed."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def mlp(module: nn.Module) -> Found | None:
    """Recognise down(gelu(up(x))) and down(act(gate(x)) * up(x)), each followed by single-input modules (dropout)."""
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
    found = [_trace_mlp(module, what, training, active) for training in (False, True)]
    if found[0] == found[1]:
        return found[0]
    return Found("mlp", what, why="its forward differs in training")


def _trace_mlp(module: nn.Module, what: str, training: bool, active: bool) -> Found | None:
    """Recognise an MLP by its forward in this mode."""
    try:
        graph, why = run_apart(module, _Shallow().trace, training)
    except Exception:  # control flow over values, several arguments: not a plain chain
        return Found("mlp", what, why="its forward cannot be traced") if active else None
    found = _match(module, what, graph)
    if found is None or not found.op:
        return found
    why = "its forward sets a global variable" if writes_globals(type(module)) else why
    return Found("mlp", what, why=why) if why else found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or replace.is_conv1d(module) or hasattr(module, "base_layer")


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


def _match(module: nn.Module, what: str, graph: fx.Graph) -> Found | None:
    nodes = [n for n in graph.nodes if n.op != "placeholder" or n.users]
    acts = [n for n in nodes if n.op in ("call_module", "call_function") and _kind(module, n)]
    if nodes[0].op != "placeholder" or len(acts) != 1:
        return None
    x, act = nodes[0], acts[0]
    kind = _kind(module, act)
    assert kind is not None
    named = (str(act.target) if act.op == "call_module" else "", kind)
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
        roles = (str(before.target), str(ups[0].target), *named)
        op, call = "swiglu", replace.gated_mlp
    else:
        rest = _chain(act, seen, nodes)
        if kind == "silu":
            return Found("mlp", what, why="bias_gelu has no SiLU")
        roles = (str(before.target), "", *named)
        op, call = "bias_gelu", replace.gelu_mlp  # type: ignore[assignment]
    if rest is None:
        return Found("mlp", what, why="more than a chain of modules follows its activation")
    children = replace.Chain(*roles, rest, ())
    sizes = [(n, len(m)) for n in children.places() if isinstance(m := replace.child(module, n), CONTAINERS)]
    chain = dataclasses.replace(children, sizes=tuple(sizes))
    return Found("mlp", what, op, call=call, arguments=(chain,), settings=settings(module))


def _is_call(node: fx.Node, x: fx.Node) -> bool:
    """Return whether node is a child module called on x alone."""
    return node.op == "call_module" and node.args == (x,) and not node.kwargs


def _chain(node: fx.Node, seen: set[fx.Node], nodes: list[fx.Node]) -> tuple[str, ...] | None:
    """Return the names of the single-input child modules from node to the output; None if the graph has other nodes."""
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
    """Recognise nn.Embedding, or a subclass that multiplies rows by `embed_scale`, without options that ops.embedding
    lacks."""
    if not isinstance(module, nn.Embedding):
        return None
    what, plain = name_of(module), type(module).forward is nn.Embedding.forward
    if not plain and not _is_scaled_embedding(module):
        return Found("embedding", what, why="it has its own forward")
    if extra := uncovered(module):
        return Found("embedding", what, why=f"it has {' and '.join(extra)}")
    kept = settings(module)
    return Found("embedding", what, "embedding", call=replace.embedding, arguments=(not plain,), settings=kept)


def _is_scaled_embedding(module: nn.Embedding) -> bool:
    """Run the class on a few rows and return whether it computes only weight[ids] times the buffer embed_scale."""
    if module._parameters.keys() != {"weight"} or module._buffers.keys() != {"embed_scale"}:
        return False
    options: dict[str, Any] = dict(device="cpu", dtype=torch.float32)
    weight = torch.randn(4, 3, generator=torch.Generator("cpu").manual_seed(0), **options)
    scale, ids = torch.tensor(1.7, **options), torch.tensor([[2, 0, 3]], device="cpu")
    made: dict[str, Any] = dict(_parameters={"weight": weight}, _buffers={"embed_scale": scale}, padding_idx=None)
    runs = [_try(module, ids, training, **made) for training in (False, True)]
    return not writes_globals(type(module)) and all(
        y is not None and torch.equal(y, weight[ids] * scale) and not why for y, why in runs
    )


def loss(module: nn.Module) -> Found | None:
    """Recognise nn.CrossEntropyLoss."""
    if type(module).forward is not nn.CrossEntropyLoss.forward:
        return None
    return Found("loss", name_of(module), "cross_entropy", call=replace.cross_entropy_loss)


def attention(module: Any) -> Found | None:
    """Recognise nn.MultiheadAttention."""
    if type(module).forward is not nn.MultiheadAttention.forward:
        return None
    what = name_of(module)
    if module.bias_k is not None or module.add_zero_attn:
        return Found("attention", what, why="it has add_bias_kv or add_zero_attn")
    return Found("attention", what, "attention", call=replace.multihead_attention)


RECOGNISERS: tuple[Callable[[Any], Found | None], ...] = (norm, mlp, attention, embedding, loss)
