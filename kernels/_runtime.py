"""Helpers of all Triton kernel files: rounding that is right in the interpreter too, row views, device properties.

Triton's interpreter (TRITON_INTERPRET=1, for tests without a GPU) truncates when it casts to bf16, so kernels round
with `cast`. It needs milliseconds for each program, whatever its width, so launchers give it fewer and larger programs.
It computes products and exponentials with numpy, whose last bits change with the BLAS and the instruction set. Kernels
therefore use `dot`, `row_dot`, `exp`, `exp2` and `log` from here: the interpreter computes them in fp64 and rounds
once, so results are the same on every machine.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))

# torch dtype -> name in a Triton signature, and type inside a kernel
TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int16: "i16"}
TYPE_NAMES |= {torch.int32: "i32", torch.int64: "i64"}
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int16: tl.int16}

# The options that every kernel is compiled with. FP fusion (a product and a sum rounded once, FMA) is set explicitly,
# because Triton 3.9 warns where it is not set and 3.10 turns it off by default.
COMPILE_OPTIONS = {"enable_fp_fusion": True}


def jit_kernel(**options: Any) -> Callable[[Callable[..., None]], Any]:
    """Return `triton.jit` with COMPILE_OPTIONS at every launch, as a decorator of kernels, not of their functions."""

    def decorate(function: Callable[..., None]) -> Any:
        jitted: Any = triton.jit(**options)(function)
        jitted.run = functools.partial(jitted.run, **COMPILE_OPTIONS)
        return jitted

    return decorate


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Round fp32 to `dtype`, to nearest, ties to even: by the hardware, or by integer steps in the interpreter."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        odd = (bits >> 16) & 1
        high = tl.where(x == x, bits + 0x7FFF + odd, 0x7FC00000) >> 16
        return high.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def dot(a, b):
    """Return a b in fp32: by tensor cores for 16 bits, in plain fp32 otherwise (the default of Triton is TF32)."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float64), b.to(tl.float64)).to(tl.float32)
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def row_dot(a, b):
    """Return the sum of a b over axis 1 in fp32, rounded like `dot`, so their difference cancels where it should."""
    if INTERPRETED:
        return tl.sum(a.to(tl.float64) * b.to(tl.float64), 1).to(tl.float32)
    else:
        return tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)


@triton.jit
def column_sum(x):
    """Return the sums of fp32 (rows, columns) over the rows, (1, columns).

    A GPU adds them as a tree. The interpreter's numpy adds one row after another, with a larger error, so it adds in
    fp64 and rounds once."""
    if INTERPRETED:
        return tl.sum(x.to(tl.float64), axis=0, keep_dims=True).to(tl.float32)
    else:
        return tl.sum(x, axis=0, keep_dims=True)


@triton.jit
def exp(x):
    """Return e^x of fp32."""
    if INTERPRETED:
        return tl.exp(x.to(tl.float64)).to(tl.float32)
    else:
        return tl.exp(x)


@triton.jit
def exp2(x):
    """Return 2^x of fp32."""
    if INTERPRETED:
        return tl.exp2(x.to(tl.float64)).to(tl.float32)
    else:
        return tl.exp2(x)


@triton.jit
def log(x):
    """Return the natural logarithm of fp32."""
    if INTERPRETED:
        return tl.log(x.to(tl.float64)).to(tl.float32)
    else:
        return tl.log(x)


def interpreted() -> bool:
    """Return whether kernels run in the interpreter of Triton, on CPU tensors."""
    return INTERPRETED.value


def ceil_pow2(n: int) -> int:
    """Return the smallest power of two >= n and >= 1; tl.arange accepts only powers of two."""
    return 1 << max(0, n - 1).bit_length()


def as_rows(x: Tensor) -> Tensor:
    """Return x (..., C) as (N, C), columns contiguous, rows any distance apart: a view if there is one, else a copy."""
    if x.dim() != 2:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors; 1 in the interpreter, which runs programs one after another."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the device of x current, because Triton launches there; this costs nothing if it already is."""
    if x.device.type == "cpu" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


@dataclass(frozen=True)
class Configuration:
    """One specialisation that a launcher may choose, for the ahead-of-time check.

    Attributes:
        kernel: the decorated kernel.
        case: the options and the width, as the report prints them.
        arguments: name -> signature type ("*bf16", "i64", "fp32"), or the value of a constexpr.
        num_warps: as in the launch.
        constexprs: name -> value.
        archs: the chips (80: sm_80) on which the launcher may choose it; None for all.
        num_stages: as in the launch; None for the default of Triton.
        maxnreg: at most this many registers per thread, as in the launch; None for the default of Triton.
        programs: that the launcher starts on each multiprocessor; None if it starts one for each tile.
        quick: whether every `make test` compiles it. It should be set without options, with all options, and for some
            of the widths; `make triton-check` and `make test-all` compile the rest.
        aligned: whether the launcher chooses it only for pointers and sizes that are multiples of 16.
    """

    kernel: Any
    case: str
    arguments: dict[str, Any]
    num_warps: int
    constexprs: dict[str, Any] = field(default_factory=dict)
    archs: tuple[int, ...] | None = None
    num_stages: int | None = None
    maxnreg: int | None = None
    programs: int | None = None
    quick: bool = True
    aligned: bool = False

    @property
    def name(self) -> str:
        """Kernel and case, the name in the report and in the list of allowed spills."""
        return f"{self.kernel.__name__}[{self.case}]"


def pointers(**dtypes: torch.dtype | None) -> dict[str, str | None]:
    """Return the signature types of pointer arguments; None stays None (an absent tensor is a constexpr)."""
    return {name: None if t is None else f"*{TYPE_NAMES[t]}" for name, t in dtypes.items()}


def split_meta(meta: dict[str, int]) -> tuple[dict[str, int], int]:
    """Split a launch shape into (constexprs, num_warps)."""
    return {k: v for k, v in meta.items() if k != "num_warps"}, meta["num_warps"]


def quick_width(block: int) -> bool:
    """Return whether every `make test` compiles a block of this width: 16, 64, ... 65536."""
    return block.bit_length() % 2 == 1


def powers_of_two(low: int, high: int) -> Iterator[int]:
    """Yield low, 2 low, ... high."""
    while low <= high:
        yield low
        low *= 2
