"""What every Triton kernel file needs: rounding that holds in the interpreter too, row views, device facts.

Triton's interpreter (TRITON_INTERPRET=1, tests without a GPU) truncates on a cast to bf16 and takes milliseconds per
program whatever its width. So kernels round through `cast`, and shapes give the interpreter fewer, larger programs.
Its products and exponentials are numpy's, whose last bits change with the BLAS and the instruction set. So kernels
take `dot`, `row_dot`, `exp`, `exp2` and `log` from here: in the interpreter they compute in fp64 and round once, the
same on every machine.
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

# torch dtype -> name in a Triton signature and type inside a kernel
TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int16: "i16"}
TYPE_NAMES |= {torch.int32: "i32", torch.int64: "i64"}
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int16: tl.int16}

# How every kernel is compiled. FP fusion, a product and a sum rounded once (FMA), is said outright: Triton 3.9 warns
# where it is not, 3.10 leaves it off.
COMPILE_OPTIONS = {"enable_fp_fusion": True}


def jit_kernel(**options: Any) -> Callable[[Callable[..., None]], Any]:
    """`triton.jit` for what launchers call (not for functions of kernels): every launch takes COMPILE_OPTIONS."""

    def decorate(function: Callable[..., None]) -> Any:
        jitted: Any = triton.jit(**options)(function)
        jitted.run = functools.partial(jitted.run, **COMPILE_OPTIONS)
        return jitted

    return decorate


@triton.jit
def cast(x, dtype: tl.constexpr):
    """fp32 to `dtype`, to nearest, ties to even: the hardware's conversion; integer steps in the interpreter."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        odd = (bits >> 16) & 1
        high = tl.where(x == x, bits + 0x7FFF + odd, 0x7FC00000) >> 16
        return high.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def dot(a, b):
    """a b in fp32: tensor cores for 16 bits, plain fp32 otherwise (Triton's default would be TF32)."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float64), b.to(tl.float64)).to(tl.float32)
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def row_dot(a, b):
    """Sum of a b over axis 1 in fp32; rounded as `dot`, so a difference of the two cancels where it should."""
    if INTERPRETED:
        return tl.sum(a.to(tl.float64) * b.to(tl.float64), 1).to(tl.float32)
    else:
        return tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)


@triton.jit
def exp(x):
    """e^x of fp32."""
    if INTERPRETED:
        return tl.exp(x.to(tl.float64)).to(tl.float32)
    else:
        return tl.exp(x)


@triton.jit
def exp2(x):
    """2^x of fp32."""
    if INTERPRETED:
        return tl.exp2(x.to(tl.float64)).to(tl.float32)
    else:
        return tl.exp2(x)


@triton.jit
def log(x):
    """Natural logarithm of fp32."""
    if INTERPRETED:
        return tl.log(x.to(tl.float64)).to(tl.float32)
    else:
        return tl.log(x)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return INTERPRETED.value


def ceil_pow2(n: int) -> int:
    """The smallest power of two >= n (>= 1): what tl.arange takes."""
    return 1 << max(0, n - 1).bit_length()


def as_rows(x: Tensor) -> Tensor:
    """x (..., C) as (N, C), contiguous columns, any distance between rows: a view where one exists, else a copy."""
    if x.dim() != 2:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 in the interpreter, where programs run one after another."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it x's, at no cost where it already is."""
    if x.device.type == "cpu" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


@dataclass(frozen=True)
class Configuration:
    """One specialisation that a launcher may pick, for the ahead-of-time check.

    arguments: name -> signature type ("*bf16", "i64", "fp32"), or the constexpr's value. archs: the chips (80: sm_80)
    on which the launcher may pick it, None for every one. num_stages, maxnreg (registers a
    thread at most): as in the launch, None for Triton's default.
    quick: compiled in every `make test`, as no options, all options and some of the widths should be; the rest is for
    `make triton-check` and `make test-all`.
    """

    kernel: Any
    case: str
    arguments: dict[str, Any]
    num_warps: int
    constexprs: dict[str, Any] = field(default_factory=dict)
    archs: tuple[int, ...] | None = None
    num_stages: int | None = None
    maxnreg: int | None = None
    quick: bool = True

    @property
    def name(self) -> str:
        """Kernel and case, as the report and the list of allowed spills name it."""
        return f"{self.kernel.__name__}[{self.case}]"


def pointers(**dtypes: torch.dtype | None) -> dict[str, str | None]:
    """Signature types of pointer arguments; None stays None (an absent tensor is a constexpr)."""
    return {name: None if t is None else f"*{TYPE_NAMES[t]}" for name, t in dtypes.items()}


def split_meta(meta: dict[str, int]) -> tuple[dict[str, int], int]:
    """A launch shape as (constexprs, num_warps)."""
    return {k: v for k, v in meta.items() if k != "num_warps"}, meta["num_warps"]


def quick_width(block: int) -> bool:
    """Whether a block of this width is compiled in every `make test`: 16, 64, ... 65536."""
    return block.bit_length() % 2 == 1


def powers_of_two(low: int, high: int) -> Iterator[int]:
    """low, 2 low, ... high."""
    while low <= high:
        yield low
        low *= 2
