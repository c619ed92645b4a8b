"""Recognise functions that rotate queries and keys, by running them, and replace them by ops.rope.

A model file has such a function under a name with `rotary` in it, and its attention calls it by name. The functions
differ in which columns form a pair (halves or neighbours), in how the columns of cos and sin follow each other, in the
direction, in the order of dimensions, and in how many tensors they take. Each is run on a few random numbers and
compared with every `Rotation`; one that equals none is left alone.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastgpt import ops

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {  # of cos and sin: how to get one column for each pair
    "halves": lambda t: t[..., : t.shape[-1] // 2],  # c0 c1 .. c0 c1 ..
    "pairs": lambda t: t[..., ::2],  # c0 c0 c1 c1 ..
    "once": lambda t: t,
}


@dataclass(frozen=True)
class Rotation:
    """What a function computes, and how it is called.

    names: its parameters; turned: those it rotates; angles: cos and sin, or one complex tensor. heads_at: 1 for tensors
    (B, H, T, D), 2 for (B, T, H, D), where the argument unsqueeze_dim does not say it. layout: a key of LAYOUTS.
    interleaved: columns 2i and 2i + 1 form a pair. unzipped: as interleaved, but the result has the pairs in halves.
    sign: -1 rotates backwards.
    """

    own: Callable[..., Any]
    names: tuple[str, ...]
    turned: tuple[str, ...]
    angles: tuple[str, ...]
    heads_at: int = 1
    layout: str = "halves"
    interleaved: bool = False
    unzipped: bool = False
    sign: int = 1


def rotate(r: Rotation, *args: Any, **kwargs: Any) -> Any:
    """Compute what r.own computes; a call with other shapes than a model's goes to r.own."""
    given = {**dict(zip(r.names, args)), **kwargs}
    tensors = [given.get(n) for n in r.turned]
    angles = [given.get(n) for n in r.angles]
    if any(t is not None and t.dim() != 4 for t in tensors) or any(t is None or t.dim() != 3 for t in angles):
        return r.own(*args, **kwargs)
    cos, sin = (angles[0].real, angles[0].imag) if len(angles) == 1 else angles  # type: ignore[union-attr]
    swap = given.get("unsqueeze_dim", r.heads_at) == 1
    xs = [t.transpose(1, 2) if swap else t for t in tensors if t is not None]  # (B, T, H, D)
    if r.unzipped:
        xs = [t.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for t in xs]
    ys = turn(xs, cos, sin if r.sign == 1 else -sin, r.layout, r.interleaved)  # type: ignore[arg-type, operator]
    ys = tuple(y.transpose(1, 2) if swap else y for y in ys)
    return ys if len(ys) == 2 else ys[0]


def turn(
    xs: list[Tensor], cos: Tensor, sin: Tensor, layout: str = "halves", interleaved: bool = False
) -> tuple[Tensor, ...]:
    """Rotate one or two tensors (B, T, H, D) by cos and sin (B or 1, T, columns) in a layout of LAYOUTS."""
    wide, t = torch.promote_types(xs[0].dtype, torch.float32), xs[0].shape[1]
    cos, sin = (LAYOUTS[layout](a) for a in (cos, sin))
    cos, sin = (a.reshape(-1, a.shape[-1]).to(wide) for a in (cos, sin))
    positions = None
    if cos.shape[0] != t:  # each sequence has its own rows
        positions = torch.arange(cos.shape[0], device=cos.device).view(-1, t)
    k = xs[1] if len(xs) == 2 else xs[0][:, :, :0]  # no heads cost nothing
    ys: tuple[Tensor, ...] = ops.rope(xs[0], k, cos, sin, interleaved=interleaved, positions=positions)
    return ys[: len(xs)]


def functions(f: types.FunctionType) -> Iterator[Any]:
    """Yield the functions that f calls by a global name and that rotate something."""
    for name in dict.fromkeys(f.__code__.co_names):
        value = f.__globals__.get(name)
        if callable(value) and "rotary" in name.lower() and not isinstance(value, type) and _roles(value):
            yield value


def _roles(function: Any) -> tuple[tuple[str, ...], ...] | None:
    """Return the parameters of a function, those it rotates and those of the angles; None if it has other ones."""
    try:
        names = tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    angles = tuple(n for n in ("cos", "sin", "freqs_cis") if n in names)
    first = tuple(itertools.takewhile(lambda n: n not in angles, names))
    usual = angles in (("cos", "sin"), ("freqs_cis",)) and len(first) in (1, 2)
    return (names, first, angles) if usual else None


@functools.cache
def recognise(function: Any) -> Rotation | None:
    """Return the rotation that a function computes; None if it is none that ops.rope has."""
    roles = _roles(function)
    if roles is None:
        return None
    start = Rotation(function, names=roles[0], turned=roles[1], angles=roles[2])
    complex_angles = start.angles == ("freqs_cis",)
    layouts = ("once",) if complex_angles else tuple(LAYOUTS)
    places = (1,) if "unsqueeze_dim" in start.names else (1, 2)
    for layout, (interleaved, unzipped), sign, heads_at in itertools.product(
        layouts, ((False, False), (True, False), (False, True)), (1, -1), places
    ):
        r = replace(start, heads_at=heads_at, layout=layout, interleaved=interleaved, unzipped=unzipped, sign=sign)
        if _same(r, 8) is True and _same(r, 12) in (True, None):
            return r
    return None


@torch.no_grad()
def _same(r: Rotation, width: int) -> bool | None:
    """Return whether r equals its function on random numbers with 8 rotated columns of `width`; None if the function
    does not take them."""
    verdicts = []
    for heads_at in (1, 2) if "unsqueeze_dim" in r.names else (r.heads_at,):
        given = _numbers(r, width, heads_at)
        try:
            theirs = r.own(**given)
        except Exception:  # this width or layout is not for it
            return None
        try:
            ours = rotate(r, **given)
        except Exception:  # it is not this rotation
            return False
        pairs = [(theirs, ours)] if isinstance(theirs, Tensor) else list(zip(theirs, ours))
        verdicts.append(all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in pairs))
    return all(verdicts)


def _numbers(r: Rotation, width: int, heads_at: int) -> dict[str, Any]:
    """Return arguments for a call of r.own, with cos and sin in the layout of r."""
    g = torch.Generator("cpu").manual_seed(0)
    options: dict[str, Any] = dict(generator=g, device="cpu", dtype=torch.float32)
    shapes = [(2, h, 3, width) if heads_at == 1 else (2, 3, h, width) for h in (4, 2)]
    given: dict[str, Any] = {n: torch.randn(s, **options) for n, s in zip(r.turned, shapes)}
    cos, sin = (torch.randn(2, 3, 4, **options) for _ in "cs")
    if r.angles == ("freqs_cis",):
        return {**given, "freqs_cis": torch.complex(cos, sin)}
    spread = {
        "halves": lambda t: torch.cat((t, t), -1),
        "pairs": lambda t: t.repeat_interleave(2, -1),
        "once": lambda t: t,
    }[r.layout]
    given |= {"cos": spread(cos), "sin": spread(sin)}
    return given | ({"unsqueeze_dim": heads_at} if "unsqueeze_dim" in r.names else {})
