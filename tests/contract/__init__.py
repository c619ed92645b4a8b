"""Data for the tests that run on every op: contract/<op>.py, found by the registry. Everything in it is optional:

calls(backend)     raw ops with valid arguments, by name, for torch.library.opcheck
ERRORS             wrong calls, the type of the error and its text
FAR                calls on (3, 32): rows more than 2^31 elements apart must give the results of adjacent rows
RUN_SHAPE          shape of the parity case that must give the same bits in three runs (default: 67 x 128)
MUTATIONS, ASTRAY  a file below csrc, its text and a broken text, which the emulation of CUDA or AddressSanitizer must
                   catch
RACES              planted races, which the race detector must find in every schedule
"""

import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt import ops  # noqa: F401 (fills the registry)
from fastgpt.core import backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Calls = dict[str, tuple[Any, tuple[Any, ...]]]
Errors = list[tuple[Callable[[], Any], type[Exception], str]]
Far = dict[str, Callable[[Tensor], Any]]
Mutations = dict[str, tuple[str, str, str]]


class Race(NamedTuple):
    """A broken text in a file below csrc; the kernel that then has a race, and texts which begin on the two lines of
    this file that the report must name."""

    kernel: str
    file: str
    text: str
    broken: str
    lines: tuple[str, str]
    options: bool = False  # of attention: in a kernel for a window, documents and so on
    slow: bool = False


Races = dict[str, Race]


def race_of_a_sum(kernel: str) -> Race:
    """Return the race of a kernel without the barrier in a sum over its block."""
    return Race(
        kernel,
        "core/cuda/reduce.cuh",
        "mine[threadIdx.x / 32] = v;\n  __syncthreads();\n  return warp_sum(",
        "mine[threadIdx.x / 32] = v;\n  return warp_sum(",
        (
            "  if (lane == 0) mine[threadIdx.x / 32] = v;\n  return warp_sum(",
            "return warp_sum(lane < n_warps ? mine[lane] : V{});",
        ),
        slow=True,
    )


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return random values, the same in every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def among_nans(t: Tensor) -> Tensor:
    """Return a view with the values of t (N, C), fp32, in the middle of a buffer of NaN."""
    wide = torch.full((t.shape[0] + 2, t.shape[1] + 6), math.nan, device=DEVICE)
    wide[1:-1, 3:-3] = t
    return wide[1:-1, 3:-3]


def both_signs(low: float, high: float) -> Tensor:
    """Return 200 001 points from low to high, evenly spaced in their logarithms, then their negatives; fp32."""
    x = torch.logspace(math.log10(low), math.log10(high), 200_001, dtype=torch.float64).float().to(DEVICE)
    return torch.cat((x, -x))


def in_ulps(error: Tensor) -> float:
    """Return the largest of these relative errors in units in the last place of fp32."""
    return float(error.max()) * 2.0**23


def heads(x: Tensor, n: int) -> Tensor:
    """View rows (3, 32) as (B, T, H, D) = (1, 3, n, 32 / n)."""
    return x.unflatten(1, (n, -1))[None]


def gather(what: str, empty: Any) -> dict[str, Any]:
    """Return op -> the attribute `what` of its module, or `empty` if it has none."""
    return {op: getattr(importlib.import_module(f"contract.{op}"), what, empty) for op in backend.ops()}
