"""Shared parts of the op files: the library that holds their schemas, kernel registration, argument checks."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastgpt.core.backend import raw_ops

LIB = torch.library.Library("fastgpt", "DEF")
# Backend -> dispatch keys for which Python registers kernels. cuda and triton have CPU too, for simulation in tests.
KEYS = {"cuda": ("CUDA", "CPU"), "triton": ("CUDA", "CPU"), "cpu": ("CPU",)}


def define(module: str, name: str, schema: str, fake: Callable[..., Any]) -> dict[str, Any]:
    """Define raw op `fastgpt::name` with one overload per backend, and return backend -> overload.

    csrc, if built, implements the `.cpu` and `.cuda` overloads. The Triton launcher `name` of fastgpt.kernels.`module`
    is imported at the first call. `fake` returns outputs of the right shape, dtype and strides.
    """
    overloads = {backend: declare(f"{name}.{backend}", schema, fake) for backend in KEYS}
    raw_ops[name] = module
    for key in KEYS["triton"]:
        LIB.impl(f"{name}.triton", _lazy_triton(module, name), key)
    return overloads


def define_driver(name: str, schema: str, fake: Callable[..., Any], driver: Callable[..., Any]) -> dict[str, Any]:
    """Define raw op `fastgpt::name` like `define`, but implement it in Python.

    `driver(backend, *args)` calls raw ops of that backend and PyTorch ops. Autograd and torch.compile see one opaque
    op.
    """
    overloads = {}
    for backend, keys in KEYS.items():
        overloads[backend] = declare(f"{name}.{backend}", schema, fake)
        for key in keys:
            LIB.impl(f"{name}.{backend}", functools.partial(driver, backend), key)
    return overloads


def declare(full: str, schema: str, fake: Callable[..., Any]) -> Any:
    """Define the schema and the fake of one overload, `name.backend`, and return the overload."""
    LIB.define(full + schema)
    torch.library.register_fake(f"fastgpt::{full}", fake, lib=LIB)
    name, backend = full.split(".")
    return getattr(getattr(torch.ops.fastgpt, name), backend)


def flop_formula(name: str, formula: Callable[..., int]) -> None:
    """Register the FLOP count of raw op `fastgpt::name` with torch.utils.flop_counter; `formula` receives the shapes of
    the tensors."""
    register_flop_formula(getattr(torch.ops.fastgpt, name))(formula)


def _lazy_triton(module: str, name: str) -> Callable[..., Any]:
    launcher: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if not launcher:
            launcher.append(getattr(importlib.import_module(f"fastgpt.kernels.{module}"), name))
        return launcher[0](*args)

    return call


def no_outputs(*args: Any) -> None:
    """Return nothing, as the fake of an op that only writes to its arguments."""


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
    """Return the largest relative L2 error of several tensors, for self-checks.

    NaN counts as infinite. The error of a 16-bit tensor is divided by 100, because rounding alone can reach 4e-3.
    """
    errors = [
        float((g.double() - e).norm() / e.norm()) / (100 if g.dtype.itemsize == 2 else 1)
        for g, e in zip(got, exact, strict=True)
    ]
    return max(math.inf if math.isnan(e) else e for e in errors)


def rows_of(t: Tensor) -> Tensor:
    """Return t (..., C) as (N, C); C may be 0."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def needs_grad(*tensors: Tensor | None) -> bool:
    """Return whether autograd must record an op over these inputs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Cast the tensors (not fp64) to the dtype of torch.autocast, if it is on, as PyTorch does for matrix products."""
    device = next(t.device.type for t in tensors if t is not None)
    if device == "meta" or not torch.is_autocast_enabled(device):  # torch 2.11 cannot compile is_autocast_available
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def gradient_place(weight: Tensor) -> tuple[Tensor | None, bool]:
    """Return the buffer that a backward may write the gradient of `weight` to, and whether it already holds a sum.
    Without a buffer, return (None, False).

    This is opt-in and eager only. If a leaf has an attribute `grad_buffer` (of its shape), the backward writes or adds
    the gradient there, which saves a new tensor, a zero fill and an addition. It then sets `weight.grad = buffer` and
    returns None. A buffer is ignored if its device or shape is not the weight's, or if its dtype is not allowed for the
    weight's gradient (`grad_dtype`): the weight was moved, resized or cast since.
    """
    buffer: Tensor | None = None if torch.compiler.is_compiling() else getattr(weight, "grad_buffer", None)
    if buffer is None or (weight.grad is not None and weight.grad is not buffer):
        return None, False
    dtype = weight.grad_dtype or buffer.dtype  # None allows any
    if (buffer.dtype, buffer.device, buffer.shape) != (dtype, weight.device, weight.shape):
        return None, False
    return buffer, weight.grad is not None


def mark_mutated(tensors: list[Tensor]) -> None:
    """Tell autograd that a raw op wrote to these tensors, because raw ops do not.

    A backward that still needs the old values then raises instead of computing wrong gradients.
    """
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
