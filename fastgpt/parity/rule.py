"""The rule of numerical parity, and the parts of a case.

    error(ours) <= k * baseline + 1 unit in the last place of the output's scale
    baseline = max(error(PyTorch's own op in that dtype), sensitivity)

k is 2 for outputs and 3 for gradients. error is the largest absolute difference from the fp64 reference. If the exact
result is zero everywhere, 32 units at scale 1 are allowed.

sensitivity applies to fp32 outputs. It is how far the exact result moves if every floating-point input moves by 2^-24
of itself, up or down at random: the largest of SHIFTS such draws. Rounding the inputs to fp32 alone causes that much
error. The error of PyTorch can be smaller by luck, and that luck depends on the BLAS and the instruction set;
sensitivity is the same on every machine. An algorithm within k of it is backward stable (Higham 2002, section 1.5).

If a layout repeats a few values (REPEATED), a 16-bit output has few roundings, and one draw may be lucky. The error of
PyTorch is then the largest of 1 + REDRAWS draws of the values, each relative to the scale of its result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FORWARD, BACKWARD = 2.0, 3.0
SHIFTS = 4  # draws of rounding errors of the inputs
REDRAWS = 3  # further draws of the values in layouts that repeat them
FP64_NOISE = 2.0**-48  # smaller results of the fp64 reference are zero up to rounding, at values around 1
LAYOUTS = ("contiguous", "transposed", "permuted", "sliced", "rows", "expanded", "misaligned")  # inputs.py shows them
GRAD_LAYOUTS = (*LAYOUTS, "broadcast")
MATRIX_LAYOUTS = tuple(layout for layout in LAYOUTS if layout != "permuted")  # those that differ in two dimensions
VECTOR_LAYOUTS = ("contiguous", "rows", "expanded", "misaligned")  # and in one dimension
REPEATED = ("expanded", "broadcast")  # few distinct values, many times
Outputs = dict[str, Tensor]  # names of gradients begin with "d"


@dataclass(frozen=True)
class Case:
    """One comparison. `shape` and `options` mean what the op defines.

    layout is that of the inputs, grad_layout that of the upstream gradient. seed selects the values that are drawn.
    """

    op: str
    dtype: torch.dtype
    layout: str
    shape: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()
    grad_layout: str = "contiguous"
    seed: int = 0

    @property
    def layouts(self) -> str:
        """Return both layouts as the table names them."""
        return f"{self.layout}/{self.grad_layout}"

    def __str__(self) -> str:
        opts = ",".join(f"{k}={v}" for k, v in self.options)
        shape = "x".join(map(str, self.shape))
        seed = f"seed={self.seed}" if self.seed else ""
        return "-".join(filter(None, (self.op, str(self.dtype).split(".")[1], self.layouts, shape, opts, seed)))


@dataclass
class Row:
    """One output of one case on one backend; sensitivity (head of this file) is 0 for 16-bit outputs."""

    op: str
    backend: str
    dtype: str
    layouts: str
    case: str
    output: str
    error: float
    torch_error: float
    allowed: float
    sensitivity: float = 0.0
    ratio: float = field(init=False)

    def __post_init__(self) -> None:
        self.ratio = math.inf if math.isnan(self.error) else self.error / self.allowed if self.allowed else self.error


def allowed_error(name: str, truth: Tensor, torch_error: float, dtype: torch.dtype, sensitivity: float = 0.0) -> float:
    """Return the allowed error of one output, by the rule at the head of this file; sensitivity counts in fp32."""
    eps, scale = torch.finfo(dtype).eps, float(truth.detach().abs().max()) if truth.numel() else 0.0
    unit = 32 * eps if scale < FP64_NOISE else eps * 2.0 ** math.floor(math.log2(scale))
    baseline = max(torch_error, sensitivity) if dtype == torch.float32 else torch_error
    return (BACKWARD if name.startswith("d") else FORWARD) * baseline + unit


def largest_error(got: Tensor, exact: Tensor) -> float:
    """Return the largest absolute difference. Equal infinities, and NaN in both places, count as equal; NaN in only
    one of them gives NaN."""
    if not exact.numel():
        return 0.0
    wide, exact = got.detach().double(), exact.detach()
    same = (wide == exact) | (wide.isnan() & exact.isnan())
    return float(torch.where(same, 0.0, (wide - exact).abs()).max())


def moved(t: Tensor, shift: int, number: int) -> Tensor:
    """Return t in fp64 with every value moved by 2^-24 of itself, up or down at random.

    shift: number of the draw. number: which input of the draw t is.
    """
    g = torch.Generator().manual_seed(1_000_000 * shift + number)
    signs = torch.randint(0, 2, t.shape, generator=g, dtype=torch.float64) * 2 - 1
    return t.double() * (1 + 2.0**-24 * signs.to(t.device))


def sensitivities(reference: Callable[..., Sequence[Tensor | None]], *inputs: Tensor | None) -> list[float]:
    """Return the sensitivity, as at this file's head, of each output of `reference(*inputs)`, computed in fp64.

    Integer tensors and None stay as they are. The sensitivity of an output that is None is 0.
    """
    found = [reference(*inputs)]
    for shift in range(1, SHIFTS + 1):
        shifted = [
            moved(t, shift, i) if t is not None and t.is_floating_point() else t for i, t in enumerate(inputs, 1)
        ]
        found.append(reference(*shifted))
    return [
        max(0.0 if exact is None or t is None else largest_error(t, exact) for t in others)
        for exact, *others in zip(*found, strict=True)
    ]


Variant = tuple[tuple[int, ...], dict[str, Any]]  # shape, options
Variants = Callable[[torch.dtype], Iterable[Variant]]


@dataclass(frozen=True)
class Subject:
    """One op as fastgpt's public function, as PyTorch's op and as the reference, with its cases.

    run(case, fn, inputs) creates the inputs, calls fn (`ours`, `torch` or `reference`), runs backward, and returns
    outputs and gradients by name. bases(dtype) yields small shapes and options. The first runs with every layout of the
    inputs times every layout of the upstream gradient; the others run with each layout of either, except layouts of
    repeated values. variants(dtype) yields other shapes, options and extremes, for contiguous tensors. layouts and
    grad_layouts are those that the op supports.
    """

    run: Callable[..., Outputs]
    ours: Callable[..., Any]
    torch: Callable[..., Any]
    reference: Callable[..., Any]
    bases: Variants
    variants: Variants
    layouts: tuple[str, ...] = LAYOUTS
    grad_layouts: tuple[str, ...] = GRAD_LAYOUTS
