"""Recognise modules that are alike only once: a deep model repeats its layers, and recognising one runs its code."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import Tensor, nn

from fastgpt.patching._settings import PLAIN

R = TypeVar("R")
_TABLES = ("_parameters", "_buffers", "_modules")


class Alike:
    """Numbers for modules: two have the same if they have the same class, attributes, shapes and children.

    Attributes other than plain values count by identity, so a module with an object of its own is like no other one.
    """

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._of_module: dict[int, int] = {}
        self._known: dict[Any, Any] = {}

    def number(self, module: nn.Module) -> int:
        """Return the number of a module; the module must live as long as this object."""
        if id(module) not in self._of_module:
            own = tuple((n, _value(v)) for n, v in module.__dict__.items() if n not in _TABLES)
            tensors = tuple((n, _form(t)) for table in _TABLES[:2] for n, t in module.__dict__[table].items())
            children = tuple((n, None if m is None else self.number(m)) for n, m in module._modules.items())
            description = (type(module), own, tensors, children)
            self._of_module[id(module)] = self._numbers.setdefault(description, len(self._numbers))
        return self._of_module[id(module)]

    def once(self, function: Callable[[Any], R], module: nn.Module) -> R:
        """Return function(module), called once for modules that are alike."""
        key = (function, self.number(module))
        if key not in self._known:
            self._known[key] = function(module)
        return self._known[key]  # type: ignore[no-any-return]

    def once_per_class(self, function: Callable[[Any], R], module: nn.Module) -> R:
        """Return function(module), called once for each class."""
        key = (function, type(module))
        if key not in self._known:
            self._known[key] = function(module)
        return self._known[key]  # type: ignore[no-any-return]


def _value(value: Any) -> Hashable:
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, tuple) and all(isinstance(v, PLAIN) for v in value):
        return tuple, tuple((type(v), v) for v in value)
    if isinstance(value, (dict, list, set)) and not value:
        return type(value)
    return id(value)


def _form(t: Tensor | None) -> Hashable:
    return None if t is None else (type(t), t.shape, t.dtype, t.device)
