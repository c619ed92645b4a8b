"""Recognise norms by what they compute: run a module on a few small rows, in training and in evaluation mode."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.ops.layer_norm import layer_norm_ref
from fastgpt.ops.rms_norm import rms_norm_ref
from fastgpt.patching import _replace as replace
from fastgpt.patching._recognise import Found, name_of, probe
from fastgpt.patching._replace import GatedNorm, Norm
from fastgpt.patching._settings import settings, writes_globals

EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12)
MAX_WIDTH = 2**18  # a wider vector does not belong to a norm (flat parameters of FSDP)


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
    if type(module).__module__.startswith("torch.") or module._modules:
        return None
    found = _own_norm(module)
    if isinstance(found, Found):
        return found
    # if it is not a norm, report it only if its name says that it is one
    return Found("norm", what, why=found) if "norm" in what.lower() else None


def _own_norm(module: nn.Module) -> Found | str:
    """Recognise a norm with at most two vectors in a user-defined leaf module; else return why it is none."""
    vectors = {n: p for n, p in module._parameters.items() if p is not None}
    buffers = {n: b for n, b in module._buffers.items() if b is not None}
    shapes = [tuple(t.shape) for t in (*vectors.values(), *buffers.values())]
    tensors = any(isinstance(v, Tensor) for v in vars(module).values()) or (vectors and buffers)
    if tensors or len(vectors) > 2 or len(set(shapes)) > 1 or any(len(shape) != 1 for shape in shapes):
        return "it has other parameters than weight and bias"
    if shapes and not 2 <= shapes[0][0] <= MAX_WIDTH:
        return "it has other parameters than weight and bias"
    if writes_globals(type(module)):
        return "its forward sets a global variable"
    takes = getattr(type(module).forward, "__code__", None)
    if len(vectors) == 1 and takes is not None and takes.co_argcount > 2:  # a gate, which may be optional
        if gated := _probe_gated(module, next(iter(vectors)), shapes[0][0]):
            return gated
    found: Found | str = ""
    for width in (shapes[0][0],) if shapes else _widths(module):
        found = _probe_norm(module, tuple(vectors), tuple(buffers), width)
        if isinstance(found, Found):
            return found
    return found


def _widths(module: nn.Module) -> tuple[int, ...]:
    """Return the widths that a norm without parameters may expect."""
    shapes = [v for v in vars(module).values() if isinstance(v, tuple) and len(v) == 1 and isinstance(v[0], int)]
    return tuple(dict.fromkeys((16, *(v[0] for v in shapes if 2 <= v[0] <= MAX_WIDTH))))


@torch.inference_mode(False)
@torch.enable_grad()
def _probe_norm(module: Any, names: tuple[str, ...], unused: tuple[str, ...], width: int) -> Found | str:
    """Run the module's class in fp32 with its settings, and return the norm that it computes, or why it is none.

    names: its parameters; unused: buffers, which it may have but not read.
    """
    g = torch.Generator("cpu").manual_seed(0)
    options: dict[str, Any] = dict(generator=g, device="cpu", dtype=torch.float32)
    made = {n: torch.randn(width, **options).requires_grad_() for n in names}
    tensors: dict[str, Any] = dict(_parameters={n: made.get(n) for n in module._parameters})
    tensors |= dict(_buffers={n: torch.randn(width, **options) for n in unused}) if unused else {}
    # rows of different means and scales; the smallest rows distinguish the epsilons
    rows = torch.randn(4, width, **options) + 0.5
    rows = rows * rows.new_tensor([[1e-7], [1e-4], [1e-2], [30.0]])
    formula: Norm | None = None
    dims, other = set[int](), "it computes neither LayerNorm nor RMSNorm"
    for shape in ((4, width), (2, 2, width), (2, 1, 2, width)):
        x = rows.view(shape).detach().requires_grad_()
        runs = [probe(module, x, training, **tensors) for training in (False, True)]
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


@torch.inference_mode(False)
@torch.no_grad()
def _probe_gated(module: Any, name: str, width: int) -> Found | None:
    """Recognise an RMSNorm of x with a gate, forward(x, gate), in groups of columns; None if it computes another."""
    g = torch.Generator("cpu").manual_seed(0)
    options: dict[str, Any] = dict(generator=g, device="cpu", dtype=torch.float32)
    made = {name: torch.randn(width, **options)}
    dims, formula = set[int](), None
    sizes = [v for v in vars(module).values() if isinstance(v, int) and not isinstance(v, bool) and 0 < v <= width]
    groups = {1, *(n for v in sizes for n in (v, width // v) if width % n == 0)}
    for shape in ((2, width), (2, 3, width), (2, 1, 2, width)):
        x, gate = torch.randn(shape, **options) + 0.3, torch.randn(shape, **options)
        runs = [probe(module, x, training, gate, _parameters=made) for training in (False, True)]
        y, again = runs[0][0], runs[1][0]
        if y is None or again is None or runs[0][1] or runs[1][1]:
            continue
        norms = [formula] if formula else list(_gated_candidates(module, name, groups))
        formula = next((n for n in norms if _close(replace.gate(n, x, gate, made[name]), y, 2e-5)), None)
        if formula is None or not torch.equal(y, again):
            return None
        dims.add(len(shape))
    if formula is None:
        return None
    kept = settings(module)
    arguments = (formula, frozenset(dims))
    return Found("norm", name_of(module), "rms_norm", call=replace.gated_norm, arguments=arguments, settings=kept)


def _gated_candidates(module: Any, name: str, groups: set[int]) -> Iterator[GatedNorm]:
    own = [v for v in vars(module).values() if isinstance(v, float) and v > 0]
    for eps, n in itertools.product(dict.fromkeys((*own, *EPSILONS)), sorted(groups)):
        yield from (GatedNorm(name, eps, n, *how) for how in (("silu", True), ("silu", False), ("sigmoid", False)))


def _candidates(module: Any, names: tuple[str, ...]) -> Iterator[Norm]:
    """Yield every norm over parameters of these names; epsilons found in the module's attributes are tried first."""
    own = [v for v in {**vars(type(module)), **vars(module)}.values() if isinstance(v, float) and v > 0]
    for eps in dict.fromkeys((*own, *EPSILONS)):
        if not names:
            yield from (Norm(op, None, None, eps) for op in ("rms_norm", "layer_norm"))
        elif len(names) == 1:
            yield from (Norm("rms_norm", names[0], None, eps, offset) for offset in (0.0, 1.0))
            yield Norm("layer_norm", names[0], None, eps)
        else:
            both = itertools.product((names, names[::-1]), (0.0, 1.0))
            yield from (Norm("layer_norm", w, b, eps, offset) for (w, b), offset in both)


def _is_norm(norm: Norm, x: Tensor, y: Tensor, made: dict[str, Tensor]) -> bool:
    """Return whether y is this norm of x, with the same gradients."""
    weight, bias = (None if n is None else made[n] for n in (norm.weight, norm.bias))
    if norm.op == "rms_norm":
        exact = rms_norm_ref(x, weight, norm.eps, weight_offset=norm.offset)
    else:
        exact = layer_norm_ref(
            x, weight + norm.offset if norm.offset and weight is not None else weight, bias, norm.eps
        )
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
