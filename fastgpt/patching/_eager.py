"""Recognise eager attention, a function of a model file or a method, by what it computes on a few random numbers; and
run such a method on the op."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.core.fallback import leave_to_torch
from fastgpt.patching import _attention
from fastgpt.patching._settings import run_apart


@dataclass(frozen=True)
class Method:
    """What a method computes: eager attention with scores times this attribute (over it if `inverse`), and the dropout
    of this child on its weights. Empty names: no scale, no dropout."""

    scale: str = ""
    inverse: bool = False
    dropout: str = ""

    def numbers(self, module: Any) -> dict[str, Any]:
        """Return the current scale and dropout as `masked` takes them."""
        scale = getattr(module, self.scale) if self.scale else 1.0
        p = getattr(module, self.dropout).p if self.dropout and module.training else 0.0
        return dict(scaling=1 / scale if self.inverse else scale, dropout=p)


def attend(module: Any, how: Method, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> Any:
    """Replace a method `_attn`: (B, H, T, D) -> the same, without weights."""
    if not _attention.is_ours(attention_mask):
        leave_to_torch("attention", _attention.OTHER_MASK)
        return type(module)._attn(module, query, key, value, attention_mask)
    y = _attention.masked(query, key, value, attention_mask, "all", **how.numbers(module))
    return y.transpose(1, 2), None


def refusal(forward: types.FunctionType, module: nn.Module) -> str:
    """Return why the attention of a forward cannot run on the op; empty if it can: its eager function computes what
    `_attention.attention` computes."""
    names = [n for n in forward.__code__.co_names if "eager" in n and callable(forward.__globals__.get(n))]
    if len(names) != 1:
        return "its eager attention is not a function of its file"
    sinks = getattr(module, "sinks", None) is not None
    if not _usual(forward.__globals__[names[0]], sinks):
        return "its eager attention computes more than the op"
    return ""


@functools.cache
def _usual(function: Any, sinks: bool) -> bool:
    groups = (1, 2) if "num_key_value_groups" in getattr(function, "__code__", function).co_names else (1,)
    with torch.no_grad():
        return all(_same(function, n, sinks, softcap) for n in groups for softcap in _softcaps(function))


def _softcaps(function: Any) -> tuple[float | None, ...]:
    return (None, 0.7) if "softcap" in inspect.signature(function).parameters else (None,)


def _same(function: Any, groups: int, sinks: bool, softcap: float | None) -> bool:
    """Compare a function with ours."""
    q, k, v, more = _numbers(4, 4 // groups)
    module = _Module(groups, more if sinks else None)
    numbers: dict[str, Any] = dict(scaling=0.3, dropout=0.0) | ({"softcap": softcap} if softcap else {})

    def ours(mask: Tensor) -> Tensor:
        y: Tensor = _attention.attention(function, True, module, q, k, v, mask, **numbers)[0]
        return y

    return _agree(lambda mask: function(module, q, k, v, mask, **numbers)[0], ours)


def _numbers(heads: int, kv_heads: int, keys: int = 4) -> list[Tensor]:
    """Return random queries, keys and values (2, heads, length, 16), and one number for each head."""
    shapes = [(2, heads, 4, 16), (2, kv_heads, keys, 16), (2, kv_heads, keys, 16), (heads,)]
    g = torch.Generator("cpu").manual_seed(0)
    return [torch.randn(shape, generator=g, device="cpu", dtype=torch.float32) for shape in shapes]


def _agree(theirs: Callable[[Tensor], Tensor], ours: Callable[[Tensor], Tensor]) -> bool:
    """Compare two functions of a mask under causal order and under padding, with which the first query sees no key.

    theirs: of the mask that transformers adds to the scores; ours: of a mask of `_attention`.
    """
    starts = torch.tensor([[0, 4], [1, 4]], device="cpu")
    for compact in (starts[:, :0], starts):
        seen = torch.ones(4, 4, dtype=torch.bool, device="cpu").tril()[None, None].expand(2, 1, 4, 4).clone()
        if compact.shape[1]:
            seen[1, :, :, 0] = False
        added = torch.zeros(seen.shape, device="cpu", dtype=torch.float32)
        added = added.masked_fill(~seen, torch.finfo(torch.float32).min)
        try:
            wanted = theirs(added)
        except Exception:  # it needs more of its module than the op gets
            return False
        got = ours(compact[..., None])
        if got.shape != wanted.shape or not torch.allclose(got, wanted, atol=1e-5):
            return False
    return True


class _Times(nn.Module):
    """Stand-in for a dropout: multiplies what it gets, and remembers the last two dimensions of it."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.shapes = factor, list[torch.Size]()

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(x.shape[-2:])
        return x * self.factor


@torch.inference_mode(False)
@torch.no_grad()
def method(module: Any) -> Method | None:
    """Return what a module's `_attn(query, key, value, mask)` computes; None if it is not eager attention in which a
    query sees what the mask says."""
    numbers = {n: v for n, v in vars(module).items() if type(v) in (int, float) and v > 0}
    names = sorted(numbers, key=lambda n: type(numbers[n]) is int)  # the number of a layer may equal its scale
    q, k, v, _ = _numbers(4, 4)
    for how in (Method(), *(Method(n, inverse) for n in names for inverse in (True, False))):
        scaling = how.numbers(module)["scaling"]

        def ours(mask: Tensor, scaling: float = scaling) -> Tensor:
            return _attention.masked(q, k, v, mask, "all", scaling=scaling).transpose(1, 2)

        def theirs(mask: Tensor) -> Tensor:
            y, again = (_run(module, (q, k, v, mask), training)[0] for training in (False, True))
            if not torch.equal(y, again):
                raise ValueError("it differs in training")
            return y

        if _agree(theirs, ours):
            return _with_dropout(module, how)
    return None


def _with_dropout(module: Any, how: Method) -> Method | None:
    """Add the dropout that a module's `_attn` applies in training; None if it does not apply to the weights alone."""
    q, k, v, _ = _numbers(4, 4, keys=6)
    try:
        (y, called), (twice, _) = (_run(module, (q, k, v), True, factor) for factor in (1.0, 2.0))
    except Exception:  # it does something else with keys in a cache
        return None
    if not called:
        return how
    ((name, shapes),) = called.items() if len(called) == 1 else (("", []),)
    usual = shapes == [torch.Size((4, 6))] and torch.allclose(twice, 2 * y)
    return replace(how, dropout=name) if usual else None


def _run(
    module: Any, given: tuple[Tensor, ...], training: bool, factor: float = 1.0
) -> tuple[Tensor, dict[str, list[torch.Size]]]:
    """Run a module's `_attn` with multiplications in place of its dropouts; return its result, and what each of them
    that was called got.

    Raises:
        ValueError: it depends on more than its arguments.
    """
    stubs = {n: _Times(factor) for n, m in module._modules.items() if isinstance(m, nn.Dropout)}
    children = {**module._modules, **stubs}
    (y, *_), why = run_apart(module, lambda bare: type(module)._attn(bare, *given), training, _modules=children)
    if why:
        raise ValueError(why)
    return y, {n: m.shapes for n, m in stubs.items() if m.shapes}


class _Module(nn.Module):
    """Stand-in for an attention module in evaluation mode."""

    def __init__(self, groups: int, sinks: Tensor | None) -> None:
        super().__init__()
        self.num_key_value_groups, self.sinks, self.head_dim, self.training = groups, sinks, 16, False
