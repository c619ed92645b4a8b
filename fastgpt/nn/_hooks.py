"""Checks whether a module may be computed without calling it, or whether a call would run hooks as well."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard, TypeVar

from torch import nn
from torch.nn.modules import module as _modules

M = TypeVar("M", bound=nn.Module)

# hooks on every module; these dicts are filled and emptied in place
_GLOBAL = (
    _modules._global_forward_pre_hooks,
    _modules._global_forward_hooks,
    _modules._global_backward_pre_hooks,
    _modules._global_backward_hooks,
)


def _hooks(m: nn.Module) -> tuple[dict[int, Any], ...]:
    return (m._forward_pre_hooks, m._forward_hooks, m._backward_pre_hooks, m._backward_hooks)  # type: ignore[return-value]


def _users(tables: tuple[Any, ...]) -> Iterator[Any]:
    """Yield the hooks that PyTorch did not set (FSDP gathers weights in hooks, the FLOP counter records names)."""
    for table in tables:
        for hook in table.values():
            if not (getattr(hook, "__module__", None) or "").startswith("torch."):
                yield hook


def plain(m: nn.Module) -> bool:
    """Return whether a call of m runs only the forward of its class: no hook, no forward set on the instance."""
    if any(_hooks(m)) or "forward" in m.__dict__:
        return False
    return not any(_GLOBAL) or not any(True for _ in _users(_GLOBAL))


def fusable(m: Any, kind: type[M]) -> TypeGuard[M]:
    """Return whether m is a plain module of exactly this class, whose parameters an op fused across modules may use."""
    return type(m) is kind and plain(m)


def watched(m: nn.Module) -> bool:
    """Return whether a user's hook, on m or on every module, sees the inputs or outputs of m."""
    tables = (*_hooks(m), *_GLOBAL)
    return any(tables) and any(True for _ in _users(tables))
