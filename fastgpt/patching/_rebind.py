"""Rebuild methods that call F.scaled_dot_product_attention and similar functions by name, with other globals.

The code object stays the same; only the names of a replaced function refer to its replacement. So nothing changes in
torch or in the user's module, a call has no extra cost, and torch.compile sees an ordinary function. The globals are
copied at that moment: a name that the user's module changes later keeps its old value in the patched method.
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastgpt.patching import _functions, _rope
from fastgpt.patching import _replace as replace
from fastgpt.patching._recognise import Found, name_of

# function of torch -> (part, op, replacement)
FUNCTIONS: dict[Any, tuple[str, str, Callable[..., Any]]] = {
    F.scaled_dot_product_attention: ("attention", "attention", _functions.sdpa),
    F.layer_norm: ("norm", "layer_norm", _functions.functional_layer_norm),
    F.rms_norm: ("norm", "rms_norm", _functions.functional_rms_norm),
    F.cross_entropy: ("loss", "cross_entropy", _functions.cross_entropy),
    nn.CrossEntropyLoss: ("loss", "cross_entropy", _functions.CrossEntropyLoss),
}
SPACES = (F, nn, torch)  # the modules in which code looks these up
IN_TRANSFORMERS = (nn.CrossEntropyLoss, F.cross_entropy)  # of these, what is replaced in transformers' own modules


def methods(module: nn.Module) -> Iterator[tuple[str, types.FunctionType]]:
    """Yield the functions that the module's class defines or inherits, except from torch's own classes."""
    seen: set[str] = set()
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch."):
            continue
        for name, f in vars(cls).items():
            if isinstance(f, types.FunctionType) and name not in seen:
                seen.add(name)
                yield name, f


def find(module: nn.Module) -> list[Found]:
    """Find the replaceable functions that this module's methods call."""
    found = []
    theirs = type(module).__module__.startswith("transformers.")
    for attribute, f in methods(module):
        inner = innermost(f)
        if attribute == "__init__" or not isinstance(inner, types.FunctionType):
            continue
        targets = [*_rope.functions(inner), *(t for t in (IN_TRANSFORMERS if theirs else FUNCTIONS) if calls(inner, t))]
        targets += _activations(inner) if theirs else []
        for target in targets:
            part, op = _part_and_op(target)
            what = f"{name_of(module)}.{attribute}: {getattr(target, '__name__', type(target).__name__)}"
            why = _refusal(inner) or ("" if _holds(f) else "its method has a decorator that cannot be rebuilt")
            if not why and part == "rope" and _rope.recognise(target) is None:
                why = "it is not a rotation that the op computes"
            found.append(Found(part, what, "" if why else op, why, attribute=attribute, function=target))
    return found


def _activations(f: types.FunctionType) -> list[Any]:
    """Return the activations that f calls by a global name, as transformers' heads do with `gelu`."""
    values = (f.__globals__.get(n) for n in f.__code__.co_names)
    return [v for v in values if isinstance(v, nn.Module) and replace.activation(v) in replace.ALONE]


def _part_and_op(target: Any) -> tuple[str, str]:
    if isinstance(target, nn.Module):
        return "mlp", "swiglu" if replace.activation(target) == "relu2" else "bias_gelu"
    return FUNCTIONS[target][:2] if target in FUNCTIONS else ("rope", "rope")


def calls(f: types.FunctionType, target: Any) -> bool:
    """Return whether f reaches target through one of its globals: target itself, torch.nn.functional, torch.nn or
    torch."""
    names = f.__code__.co_names
    if any(f.__globals__.get(n) is target for n in names):
        return True
    return target.__name__ in names and any(f.__globals__.get(n) in (F, nn, torch) for n in names)


def _refusal(f: types.FunctionType) -> str:
    if any(i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") for i in dis.get_instructions(f)):
        return "its method writes to a global"
    return "its method reads __name__" if "__name__" in f.__code__.co_names else ""


def innermost(f: Any) -> types.FunctionType:
    """Return the function inside its decorators."""
    inner: types.FunctionType = inspect.unwrap(f)
    return inner


def refers(f: types.FunctionType, target: Any) -> bool:
    """Return whether one of f's global names, or of the functions inside it, refers to target."""
    codes = [f.__code__]
    for code in codes:
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return any(f.__globals__.get(n) is target for code in codes for n in code.co_names)


def standard(targets: list[Any]) -> list[tuple[Any, Any]]:
    """Return (target, replacement) for functions in FUNCTIONS, activations and rotations."""
    return [(t, _replacement(t)) for t in targets]


def _replacement(target: Any) -> Callable[..., Any]:
    if isinstance(target, nn.Module):
        return functools.partial(replace.activate, target)
    if target in FUNCTIONS:
        return FUNCTIONS[target][2]
    rotation = _rope.recognise(target)
    assert rotation is not None
    return functools.partial(_rope.rotate, rotation)


def rebind(f: types.FunctionType, places: list[tuple[Any, Any]]) -> types.FunctionType:
    """Copy f with every reference to a target replaced; if f is decorated, copy the function inside its decorators.

    places: (target, replacement).

    Raises:
        ValueError: a decorator does not hold the function that it decorates.
    """
    wrapped = f.__dict__.get("__wrapped__")
    if wrapped is not None:
        return _redecorate(f, wrapped, rebind(wrapped, places))
    spaces = _namespaces(tuple((t, ours) for t, ours in places if any(_in(s, t) for s in SPACES)))
    scope = {name: _swap(value, places, spaces) for name, value in f.__globals__.items()}
    del scope["__name__"]  # torch.compile would look up the names in the module of this name
    return _copy(f, scope, f.__closure__)


def _copy(f: types.FunctionType, scope: dict[str, Any], closure: Any) -> types.FunctionType:
    new = types.FunctionType(f.__code__, scope, f.__name__, f.__defaults__, closure)
    new.__kwdefaults__, new.__dict__ = f.__kwdefaults__, dict(f.__dict__)
    return new


def _holds(f: Any) -> bool:
    """Return whether every decorator of f holds the function that it decorates, so that it can be rebuilt."""
    wrapped = f.__dict__.get("__wrapped__")
    return wrapped is None or (any(c.cell_contents is wrapped for c in f.__closure__ or ()) and _holds(wrapped))


def _redecorate(f: types.FunctionType, old: Any, new: Any) -> types.FunctionType:
    cells = f.__closure__ or ()
    if not _holds(f):
        raise ValueError(f"patch: {f.__qualname__} has a decorator that cannot be rebuilt")
    again = _copy(f, f.__globals__, tuple(types.CellType(new) if c.cell_contents is old else c for c in cells))
    again.__dict__["__wrapped__"] = new
    return again


def _swap(value: Any, places: list[tuple[Any, Any]], spaces: dict[int, Any]) -> Any:
    if id(value) in spaces:
        return spaces[id(value)]
    return next((ours for theirs, ours in places if theirs is value), value)


def _in(space: types.ModuleType, target: Any) -> bool:
    return vars(space).get(getattr(target, "__name__", "")) is target


@functools.cache
def _namespaces(places: tuple[tuple[Any, Any], ...]) -> dict[int, types.ModuleType]:
    """Return copies of torch.nn.functional, torch.nn and torch with these functions replaced, by id of the original.

    places: (target, replacement).
    """
    if not places:
        return {}
    copies, inner = dict[int, types.ModuleType](), dict[str, Any]()
    for space, name in zip(SPACES, ("functional", "nn", "torch")):
        changes = {t.__name__: ours for t, ours in places if _in(space, t)}
        copies[id(space)] = copy = types.ModuleType(space.__name__)
        copy.__dict__.update({**vars(space), **changes, **inner})
        inner = {name: copy}
    return copies
