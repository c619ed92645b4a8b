"""The formulas of activations.cuh for 16-bit tensors against fp64, with ex2.approx and rcp.approx as inaccurate as
permitted."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import emulator
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
HOST = Path(__file__).parent / "include"
U = 2.0**-23
SOURCE = """
#include <cuda_runtime.h>
#include "core/cuda/activations.cuh"
using namespace fastgpt;
extern "C" void set_errors(float ex2, float rcp) { ptx::ex2_error = ex2, ptx::rcp_error = rcp; }
#define UNARY(name, expression) \\
  extern "C" void name(const float* in, float* out, int64_t n) { \\
    for (int64_t i = 0; i < n; ++i) { const float x = in[i]; out[i] = expression; } \\
  }
UNARY(gelu, cuda::gelu<bf16>(x))
UNARY(gelu_slope, cuda::gelu_and_slope<bf16>(x).slope)
UNARY(gelu_again, cuda::gelu_and_slope<bf16>(x).value)
UNARY(gelu_tanh, cuda::gelu_tanh<bf16>(x))
UNARY(gelu_tanh_slope, cuda::gelu_tanh_and_slope<bf16>(x).slope)
UNARY(gelu_tanh_again, cuda::gelu_tanh_and_slope<bf16>(x).value)
UNARY(silu, cuda::silu<bf16>(x))
UNARY(silu_slope, cuda::silu_and_slope<bf16>(x).slope)
UNARY(silu_again, cuda::silu_and_slope<bf16>(x).value)
"""
# ptx.cuh for the host, with an error that the test chooses
EXACT = {
    "inline float ex2(float x) { return exp2f(x) < 0x1p-126f ? 0.0f : exp2f(x); }": """
inline double ex2_error = 0.0, rcp_error = 0.0;
inline float flush(double x) { return std::fabs(x) < 0x1p-126 ? 0.0f : static_cast<float>(x); }
inline float ex2(float x) { return flush(std::exp2(double{x}) * (1.0 + ex2_error)); }
""",
    "inline float rcp(float x) { return fabsf(1.0f / x) < 0x1p-126f ? 0.0f : 1.0f / x; }": """
inline float rcp(float x) { return flush(1.0 / double{x} * (1.0 + rcp_error)); }
""",
}


def phi(x: Tensor) -> Tensor:
    return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def tanh_argument(x: Tensor) -> Tensor:
    return 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


def gelu_tanh_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(tanh_argument(x))
    rise = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    return s + x * s * torch.sigmoid(-tanh_argument(x)) * rise


VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: x * 0.5 * torch.erfc(-x / math.sqrt(2)),
    "gelu_again": lambda x: x * 0.5 * torch.erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: x * torch.sigmoid(tanh_argument(x)),
    "gelu_tanh_again": lambda x: x * torch.sigmoid(tanh_argument(x)),
    "silu": lambda x: x * torch.sigmoid(x),
    "silu_again": lambda x: x * torch.sigmoid(x),
}
SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_slope": lambda x: 0.5 * torch.erfc(-x / math.sqrt(2)) + x * phi(x),
    "gelu_tanh_slope": gelu_tanh_slope,
    "silu_slope": lambda x: torch.sigmoid(x) + x * torch.sigmoid(x) * torch.sigmoid(-x),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("short")
    text = (HOST / "core" / "cuda" / "ptx.cuh").read_text()
    for exact, wrong in EXACT.items():
        assert text.count(exact) == 1
        text = text.replace(exact, wrong)
    (folder / "core" / "cuda").mkdir(parents=True)
    (folder / "core" / "cuda" / "ptx.cuh").write_text(text)
    (folder / "short.cpp").write_text(SOURCE)
    include = [f"-I{p}" for p in (folder, HOST, ROOT / "csrc")]
    flags = ["-std=c++17", "-O1", *emulator.ROUNDING, "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    subprocess.run(["g++", *flags, *include, str(folder / "short.cpp"), "-o", str(folder / "short.so")], check=True)
    return ctypes.CDLL(str(folder / "short.so"))


def call(library: ctypes.CDLL, name: str, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    pointers = (ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(x.numel()))
    getattr(library, name)(*pointers)
    return y.double()


@pytest.mark.parametrize("ex2, rcp", [(0, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_errors_are_as_stated(library: ctypes.CDLL, ex2: int, rcp: int) -> None:
    library.set_errors(ctypes.c_float(ex2 * 2.0**-22), ctypes.c_float(rcp * 2.0**-23))
    x = torch.arange(0x20000000, 0x46000000, 4999, dtype=torch.int32).view(torch.float32)  # 1e-19 to 8192
    x = torch.cat((-x, torch.zeros(1), x))
    for name, exact in VALUES.items():
        error = (call(library, name, x) - exact(x.double())).abs() / x.abs().clamp(min=1e-30)
        assert float(error.max()) <= 3 * U, name
    for name, exact in SLOPES.items():
        assert float((call(library, name, x) - exact(x.double())).abs().max()) <= 3.2 * U, name


def test_ends(library: ctypes.CDLL) -> None:
    library.set_errors(ctypes.c_float(0), ctypes.c_float(0))
    x = torch.tensor([math.nan, math.inf, 1e30, -1e30, -1e4])
    for name in VALUES:
        y = call(library, name, x)
        assert y[0].isnan() and y[1] == math.inf and y[2] == float(x[2]) and float(y[3:].abs().max()) < 1e-30, name
    for name in SLOPES:
        y = call(library, name, x)
        assert y[0].isnan() and y[1:3].tolist() == [1, 1] and float(y[3:].abs().max()) < 1e-30, name
