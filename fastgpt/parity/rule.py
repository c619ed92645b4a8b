"""The rule of numerical parity, and what every case is made of.

    error(ours) <= k * error(PyTorch's own op in that dtype) + 1 unit in the last place of the output's scale

k is 2 for outputs and 3 for gradients; error is the largest absolute difference to the fp64 reference; where the exact
result is zero everywhere, 32 units at scale 1 are allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FORWARD, BACKWARD = 2.0, 3.0
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded", "misaligned")
Outputs = dict[str, Tensor]  # names of gradients begin with "d"


@dataclass(frozen=True)
class Case:
    """One comparison; `shape` and `options` are the op's own."""

    op: str
    dtype: torch.dtype
    layout: str
    shape: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        opts = ",".join(f"{k}={v}" for k, v in self.options)
        shape = "x".join(map(str, self.shape))
        return "-".join(filter(None, (self.op, str(self.dtype).split(".")[1], self.layout, shape, opts)))


@dataclass
class Row:
    """One output of one case on one backend."""

    op: str
    backend: str
    dtype: str
    layout: str
    case: str
    output: str
    error: float
    torch_error: float
    allowed: float
    ratio: float = field(init=False)

    def __post_init__(self) -> None:
        self.ratio = math.inf if math.isnan(self.error) else self.error / self.allowed if self.allowed else self.error


def lay(t: Tensor, layout: str) -> Tensor:
    """A tensor of t's shape in this memory layout. Values are t's, except for 'expanded': its first row everywhere."""
    if layout == "transposed" and t.dim() >= 2:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 5), torch.nan, dtype=t.dtype, device=t.device)
        wide[..., 2:-3] = t
        return wide[..., 2:-3]
    if layout == "expanded" and t.numel():
        return (
            t[:1].expand(t.shape)
            if t.dim() == 1
            else t.reshape(-1, t.shape[-1])[:1].expand(t.shape[:-1].numel(), -1).view(t.shape)
        )
    if layout == "misaligned":
        return torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape)
    return t.clone()


def allowed_error(name: str, truth: Tensor, torch_error: float, dtype: torch.dtype) -> float:
    """The rule at this file's head for one output."""
    eps, scale = torch.finfo(dtype).eps, float(truth.detach().abs().max()) if truth.numel() else 0.0
    unit = 32 * eps if scale == 0 else eps * 2.0 ** math.floor(math.log2(scale))
    return (BACKWARD if name.startswith("d") else FORWARD) * torch_error + unit


class Inputs:
    """Seeded tensors of one case: the same values, rounded to their dtype, in its layout; for the truth in fp64."""

    def __init__(self, case: Case, device: str, wide: bool) -> None:
        self.case, self.device, self.wide, self.seed = case, device, wide, 0

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        """The next random tensor."""
        self.seed += 1
        g = torch.Generator().manual_seed(self.seed)
        t = (torch.randn(shape, generator=g, dtype=torch.float64) * scale + shift).to(dtype).to(self.device)
        t = lay(t, self.case.layout)
        return t.double() if self.wide else t

    def leaf(self, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        """The next random tensor, as a leaf that requires grad."""
        return self.tensor(shape, dtype, scale, shift).detach().requires_grad_()


Variant = tuple[tuple[int, ...], dict[str, Any]]  # shape, options
Variants = Callable[[torch.dtype], Iterable[Variant]]


@dataclass(frozen=True)
class Subject:
    """One op: how it runs as fastgpt's public function, as PyTorch's own and as the reference; and on what.

    run(case, fn, inputs) makes the inputs, calls fn (one of the next three), runs backward, and returns outputs and
    gradients by name. bases(dtype) gives the small shapes and options that go through every layout, variants(dtype)
    the other shapes, options and extremes, each in contiguous tensors.
    """

    run: Callable[..., Outputs]
    ours: Callable[..., Any]
    torch: Callable[..., Any]
    reference: Callable[..., Any]
    bases: Variants
    variants: Variants
    layouts: tuple[str, ...] = LAYOUTS
