"""Recognise modules by what they compute, not by their names; see `_norm` and `_mlp` for norms and MLPs.

So a norm or MLP of an unknown model is found as reliably as one of Llama, and a module that only looks like one is not.
Each module runs in training and in evaluation mode; one that computes different things in these modes, draws random
numbers or changes itself is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.nn.embedding import uncovered
from fastgpt.patching import _functions
from fastgpt.patching import _replace as replace
from fastgpt.patching._settings import Settings, run_apart, settings, writes_globals

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # their forward, or a loop, runs all children


@dataclass(frozen=True)
class Found:
    """Something in a module that `op` can replace, or cannot, for the reason `why` (then `op` is empty).

    `call` becomes `attribute` of the instance and is called with the module, `arguments` and the arguments of the call,
    as long as the module's `settings` do not change. If a method calls `function` by name, `call` replaces that
    function instead. `covers` names the children that it computes too or, if it was left, those that could still be
    replaced in its place.
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
    covers: tuple[str, ...] = ()


def name_of(module: nn.Module) -> str:
    """Return the name of the module's class."""
    return type(module).__name__


def probe(module: nn.Module, x: Any, training: bool, *args: Any, **attributes: Any) -> tuple[Tensor | None, str]:
    """Run the module's class on x and args with these attributes; return its result, None if that is not a tensor, and
    what else it does."""

    def call(bare: Any) -> Any:
        with torch.autocast("cpu", enabled=False), torch.device("cpu"):
            return type(module).forward(bare, x, *args)

    try:
        y, why = run_apart(module, call, training, **attributes)
    except Exception:  # it expects other arguments, or reads what a bare copy lacks
        return None, ""
    return (y, why) if isinstance(y, Tensor) else (None, "")


def embedding(module: nn.Module) -> Found | None:
    """Recognise nn.Embedding, without options that ops.embedding lacks, or a subclass that multiplies rows by
    `embed_scale` or only computes which rows it returns."""
    if not isinstance(module, nn.Embedding):
        return None
    what, plain = name_of(module), type(module).forward is nn.Embedding.forward
    if extra := uncovered(module):
        return Found("embedding", what, why=f"it has {' and '.join(extra)}")
    kept, options = settings(module), dict[str, Any](call=replace.embedding, arguments=(not plain,))
    if not plain and not _is_scaled_embedding(module):
        options = dict(call=replace.rows, arguments=())
        if not _returns_rows(module):
            return Found("embedding", what, why="it has its own forward")
    return Found("embedding", what, "embedding", settings=kept, **options)


def _is_scaled_embedding(module: nn.Embedding) -> bool:
    """Run the class on a few rows and return whether it computes only weight[ids] times embed_scale, a buffer or a
    number."""
    number = isinstance(module.__dict__.get("embed_scale"), (int, float))
    if module._parameters.keys() != {"weight"} or module._buffers.keys() != (set() if number else {"embed_scale"}):
        return False
    options: dict[str, Any] = dict(device="cpu", dtype=torch.float32)
    weight = torch.randn(4, 3, generator=torch.Generator("cpu").manual_seed(0), **options)
    scale, ids = torch.tensor(1.7, **options), torch.tensor([[2, 0, 3]], device="cpu")
    made: dict[str, Any] = dict(_parameters={"weight": weight}, padding_idx=None)
    made |= dict(embed_scale=1.7) if number else dict(_buffers={"embed_scale": scale})
    runs = [probe(module, ids, training, **made) for training in (False, True)]
    return not writes_globals(type(module)) and all(
        y is not None and torch.equal(y, weight[ids] * scale) and not why for y, why in runs
    )


def _returns_rows(module: nn.Embedding) -> bool:
    """Run the class on token ids, or on their shape, and return whether its result is rows of its weight that do not
    depend on the weight."""
    if module._parameters.keys() != {"weight"} or module._buffers or module._modules or writes_globals(type(module)):
        return False
    g, ids = torch.Generator("cpu").manual_seed(0), torch.tensor([[2, 0, 3]], device="cpu")
    weight = torch.randn(min(len(module.weight), 64), 3, generator=g, device="cpu", dtype=torch.float32)
    for x in (ids, ids.shape):
        runs = [probe(module, x, training, _parameters={"weight": weight}) for training in (False, True)]
        numbers, _ = probe(module, x, False, _parameters={"weight": torch.arange(len(weight), device="cpu")[:, None]})
        if (
            numbers is not None
            and not numbers.is_floating_point()
            and all(y is not None and not why for y, why in runs)
        ):
            return all(torch.equal(y, weight[numbers[..., 0]]) for y, _ in runs if y is not None)
    return False


def loss(module: nn.Module) -> Found | None:
    """Recognise nn.CrossEntropyLoss."""
    if type(module).forward is not nn.CrossEntropyLoss.forward:
        return None
    return Found("loss", name_of(module), "cross_entropy", call=_functions.cross_entropy_loss)


def attention(module: Any) -> Found | None:
    """Recognise nn.MultiheadAttention."""
    if type(module).forward is not nn.MultiheadAttention.forward:
        return None
    what = name_of(module)
    if module.bias_k is not None or module.add_zero_attn:
        return Found("attention", what, why="it has add_bias_kv or add_zero_attn")
    return Found("attention", what, "attention", call=replace.multihead_attention)
