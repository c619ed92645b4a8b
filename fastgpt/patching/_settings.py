"""Find the settings of a module, that is, what its code reads besides tensors and children, and run that code without
side effects.

A replacement computes what the code computed when the model was patched. The settings that the code names are stored
with it and compared at every call; once one has changed, the module's own forward runs again.
"""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import random
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

MISSING = "<missing>"  # a string, which torch.compile treats as a constant
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_ON_EVERY_MODULE = frozenset(dir(nn.Module()))
Settings = tuple[tuple[tuple[str, ...], Any], ...]


def _functions(cls: type, name: str) -> Iterator[Any]:
    """Yield the functions called `name` of cls and of its base classes other than torch's, without decorators."""
    for base in cls.__mro__:
        if base.__module__.startswith("torch.") or base is object:
            continue
        f = vars(base).get(name)
        f = getattr(f, "fget", None) or getattr(f, "__func__", f)
        if callable(f) and isinstance(inner := inspect.unwrap(f), types.FunctionType):
            yield inner


def _codes(cls: type, method: str) -> list[types.CodeType]:
    """Return the code of a method and of the methods and properties of its class that it names."""
    todo, seen, codes = [method], set[str](), list[types.CodeType]()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for f in _functions(cls, name):
            nested = [f.__code__]
            for code in nested:
                nested += [c for c in code.co_consts if isinstance(c, types.CodeType)]
                todo += code.co_names
            codes += nested
    return codes


def writes_globals(cls: type, method: str = "forward") -> bool:
    """Return whether a method's code sets a global variable."""
    codes = _codes(cls, method)
    return any(i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") for code in codes for i in dis.get_instructions(code))


def settings(module: nn.Module, method: str = "forward") -> Settings:
    """Return what the method reads of its module: (path, value), where a path is (attribute,) or (attribute, attribute
    of that one).

    Tensors, parameters, buffers, children and methods are not included, because replacements read or call them.
    """
    codes = _codes(type(module), method)
    loaded = dict.fromkeys(n for code in codes for n in code.co_names)
    named = dict.fromkeys(c for code in codes for c in code.co_consts if isinstance(c, str) and c.isidentifier())
    found: list[tuple[tuple[str, ...], Any]] = []
    for name in {**loaded, **named}:
        if name in _ON_EVERY_MODULE or any(True for _ in _functions(type(module), name)):
            continue
        value = _read(module, (name,))
        if isinstance(value, (nn.Module, torch.Tensor)):
            continue
        if value is MISSING:
            found += [((name,), MISSING)] if name in named else []
        elif callable(value):
            found.append(((name,), value))
        elif _plain(value):
            found.append(((name,), copy.deepcopy(value)))
        else:  # a user's object, such as a config: what the code may read of it
            inner = [(n, _read(value, (n,))) for n in loaded]
            found += [((name, n), copy.deepcopy(v)) for n, v in inner if v is not MISSING and _plain(v)]
    return tuple(found)


def _plain(value: Any) -> bool:
    if isinstance(value, (tuple, list, set, frozenset)):
        return all(map(_plain, value))
    return all(map(_plain, value.values())) if isinstance(value, dict) else isinstance(value, PLAIN)


def _read(module: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        module = getattr(module, name, MISSING)
    return module


def changed(module: nn.Module, kept: Settings) -> str:
    """Return the first of these settings that has changed; empty if none has."""
    for path, value in kept:
        now = _read(module, path)
        if now is not value and not _equal(now, value):
            return ".".join(path)
    return ""


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, functools.partial) and isinstance(b, functools.partial):  # a copied model has another partial
        return a.func is b.func and a.args == b.args and a.keywords == b.keywords
    return type(a) is type(b) and bool(a == b)


def bare_copy(module: nn.Module) -> Any:
    """Copy a module, with its class and settings but without hooks, to run once: its forward changes only the copy."""
    bare = object.__new__(type(module))
    nn.Module.__init__(bare)
    hooks = {n: v for n, v in bare.__dict__.items() if "hooks" in n}
    kept = {n: copy.copy(v) if isinstance(v, (dict, list, set)) else v for n, v in module.__dict__.items()}
    bare.__dict__.update({**kept, **hooks})
    return bare


def run_apart(module: nn.Module, call: Callable[[Any], Any], training: bool, **attributes: Any) -> tuple[Any, str]:
    """Call call(bare copy); return its result, and how it depends on more than its arguments. Generators are restored.

    Raises:
        Exception: whatever the module's code raises.
    """
    bare = bare_copy(module)
    bare.__dict__ |= {**attributes, "training": training}
    before = _state(bare)
    with torch.random.fork_rng(devices=[]):
        drawn = (torch.get_rng_state(), random.getstate())
        try:
            value = call(bare)
            random_numbers = not torch.equal(drawn[0], torch.get_rng_state()) or drawn[1] != random.getstate()
        finally:
            random.setstate(drawn[1])
    if random_numbers:
        return value, "its forward draws random numbers"
    return value, "" if _same_state(before, _state(bare)) else "its forward changes its own attributes"


def _state(module: nn.Module) -> dict[tuple[str, Any], Any]:
    """Return every attribute and every entry of containers; tensors with their version."""
    flat: dict[tuple[str, Any], Any] = {}
    for name, value in module.__dict__.items():
        entries = (
            enumerate(value) if isinstance(value, (list, set)) else value.items() if isinstance(value, dict) else ()
        )
        flat[name, MISSING] = type(value) if isinstance(value, (dict, list, set)) else value
        flat |= {(name, key): v for key, v in entries}
    return {k: (v, v._version if isinstance(v, torch.Tensor) and not v.is_inference() else 0) for k, v in flat.items()}


def _same_state(a: dict[tuple[str, Any], Any], b: dict[tuple[str, Any], Any]) -> bool:
    return a.keys() == b.keys() and all(v[0] is b[k][0] and v[1] == b[k][1] for k, v in a.items())
