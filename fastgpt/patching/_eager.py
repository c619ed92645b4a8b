"""Recognise the eager attention function of a model file by what it computes on a few random numbers."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.patching import _attention


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
    """Compare a function with ours under a causal mask and under a mask with padding, whose first query sees no key."""
    g = torch.Generator("cpu").manual_seed(0)
    options: dict[str, Any] = dict(generator=g, device="cpu", dtype=torch.float32)
    q, k, v = (torch.randn(2, h, 4, 16, **options) for h in (4, 4 // groups, 4 // groups))
    module = _Module(groups, torch.randn(4, **options) if sinks else None)
    numbers: dict[str, Any] = dict(scaling=0.3, dropout=0.0) | ({"softcap": softcap} if softcap else {})
    starts = torch.tensor([[0, 4], [1, 4]], device="cpu")
    for ours in (starts[:, :0], starts):
        seen = torch.ones(4, 4, dtype=torch.bool, device="cpu").tril()[None, None].expand(2, 1, 4, 4).clone()
        if ours.shape[1]:
            seen[1, :, :, 0] = False
        theirs = torch.zeros(seen.shape, device="cpu", dtype=torch.float32)
        theirs = theirs.masked_fill(~seen, torch.finfo(torch.float32).min)
        try:
            wanted: Tensor = function(module, q, k, v, theirs, **numbers)[0]
        except Exception:  # it needs more of its module than the op gets
            return False
        got = _attention.attention(function, True, module, q, k, v, ours[..., None], **numbers)[0]
        if got.shape != wanted.shape or not torch.allclose(got, wanted, atol=1e-5):
            return False
    return True


class _Module(nn.Module):
    """Stand-in for an attention module in evaluation mode."""

    def __init__(self, groups: int, sinks: Tensor | None) -> None:
        super().__init__()
        self.num_key_value_groups, self.sinks, self.head_dim, self.training = groups, sinks, 16, False
