"""What every op file needs: the library its schemas go into, kernel registration and argument checks."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

LIB = torch.library.Library("fastgpt", "DEF")
# Backend -> dispatch keys of what is registered from Python. CPU for the first two: where they are simulated
KEYS = {"cuda": ("CUDA", "CPU"), "triton": ("CUDA", "CPU"), "cpu": ("CPU",)}


def define(module: str, name: str, schema: str, fake: Callable[..., Any]) -> dict[str, Any]:
    """Define raw op `fastgpt::name` with one overload per backend; returns backend -> overload.

    csrc registers the `.cpu` and `.cuda` overloads (when built); the Triton launcher `name` of fastgpt.kernels.`module`
    is imported at its first call. `fake` gives outputs of the right shape, dtype and strides.
    """
    overloads = {backend: _declare(f"{name}.{backend}", schema, fake) for backend in KEYS}
    for key in KEYS["triton"]:
        LIB.impl(f"{name}.triton", _lazy_triton(module, name), key)
    return overloads


def define_driver(name: str, schema: str, fake: Callable[..., Any], driver: Callable[..., Any]) -> dict[str, Any]:
    """Define raw op `fastgpt::name` like `define`, served by Python: `driver(backend, *args)` calls that backend's raw
    ops and torch's, and all of it is one opaque op to autograd and torch.compile."""
    overloads = {}
    for backend, keys in KEYS.items():
        overloads[backend] = _declare(f"{name}.{backend}", schema, fake)
        for key in keys:
            LIB.impl(f"{name}.{backend}", functools.partial(driver, backend), key)
    return overloads


def _declare(full: str, schema: str, fake: Callable[..., Any]) -> Any:
    """Schema and fake of one overload, `name.backend`."""
    LIB.define(full + schema)
    torch.library.register_fake(f"fastgpt::{full}", fake, lib=LIB)
    name, backend = full.split(".")
    return getattr(getattr(torch.ops.fastgpt, name), backend)


def flop_formula(name: str, formula: Callable[..., int]) -> None:
    """Tell torch.utils.flop_counter what raw op `fastgpt::name` costs; `formula` gets shapes in its tensors' places."""
    register_flop_formula(getattr(torch.ops.fastgpt, name))(formula)


def _lazy_triton(module: str, name: str) -> Callable[..., Any]:
    launcher: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if not launcher:
            launcher.append(getattr(importlib.import_module(f"fastgpt.kernels.{module}"), name))
        return launcher[0](*args)

    return call


def no_outputs(*args: Any) -> None:
    """The fake of an op that writes to its arguments and returns nothing."""


def contiguous_like(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return new contiguous tensors with the shapes and dtypes of these, None for None: the gradients that a backward
    raw op returns, for its fake."""
    return tuple(None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


def fp64_results(ref: Callable[..., Any], inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs of `ref` on fp64 copies of `inputs`, then the gradients of the inputs for the `upstream`
    gradients of the outputs, for self-checks."""
    leaves = [t.double().requires_grad_() for t in inputs]
    outputs = ref(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(outputs, leaves, [g.double() for g in upstream])
    return [*(t.detach() for t in outputs), *grads]


def relative_error(got: list[Tensor], exact: list[Tensor]) -> float:
    """Largest relative L2 error of several tensors (NaN counts as infinite), for self-checks; of 16-bit tensors a
    hundredth of it, since rounding alone is up to 4e-3 there."""
    errors = [
        float((g.double() - e).norm() / e.norm()) / (100 if g.dtype.itemsize == 2 else 1)
        for g, e in zip(got, exact, strict=True)
    ]
    return max(math.inf if math.isnan(e) else e for e in errors)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to be told of an op over these inputs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Under torch.autocast, the tensors in its dtype (fp64 stays): what matmul-like ops do with their inputs."""
    device = next(t.device.type for t in tensors if t is not None)
    if device == "meta" or not torch.is_autocast_enabled(device):  # torch 2.11 cannot compile is_autocast_available
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def gradient_place(weight: Tensor) -> tuple[Tensor | None, bool]:
    """Where a backward may put `weight`'s gradient itself: (buffer, whether a sum is in it already), or (None, False).

    Opt-in, eager only: a leaf with an attribute `grad_buffer` (of its shape) gets its gradient written or added there,
    without a new tensor, a zero fill or an add behind it. The backward sets `weight.grad = buffer` and returns None.
    A buffer of another device or shape, or of a dtype that the weight's gradient cannot have (`grad_dtype`), is
    ignored: the weight was moved, resized or cast since.
    """
    buffer: Tensor | None = None if torch.compiler.is_compiling() else getattr(weight, "grad_buffer", None)
    if buffer is None or (weight.grad is not None and weight.grad is not buffer):
        return None, False
    dtype = weight.grad_dtype or buffer.dtype  # None allows any
    if (buffer.dtype, buffer.device, buffer.shape) != (dtype, weight.device, weight.shape):
        return None, False
    return buffer, weight.grad is not None


def mark_mutated(tensors: list[Tensor]) -> None:
    """Tell autograd that a raw op wrote to these (raw ops do not), so that a backward that still needs the old values
    raises instead of being wrong."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


def check_like(
    op: str,
    name: str,
    t: Tensor | None,
    shape: tuple[int, ...],
    like: Tensor,
    dtypes: tuple[torch.dtype, ...],
    why: str,
) -> None:
    """Raise unless optional tensor `t` has this shape, one of these dtypes, and `like`'s device."""
    if t is None:
        return
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} is {t!r}, expected a tensor")
    if tuple(t.shape) != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected {shape} {why}")
    if t.dtype not in dtypes:
        raise TypeError(f"{op}: {name} is {t.dtype}, expected {' or '.join(str(d) for d in dict.fromkeys(dtypes))}")
    if t.device != like.device:
        raise ValueError(f"{op}: {name} is on {t.device}, expected {like.device}")


def check_float(op: str, name: str, t: object) -> None:
    """Raise unless `t` is a floating-point tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} is {t!r}, expected a tensor")
    if not t.is_floating_point():
        raise TypeError(f"{op}: {name} is {t.dtype}, expected a floating-point tensor")
