"""csrc/core/math.h against fp64 and against PyTorch's conversions: the errors stated there hold."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
U = 2.0**-23
SOURCE = """
#include "core/math.h"
using namespace fastgpt;
#define UNARY(name, out, in, expression) \\
  extern "C" void name(const in* x, out* y, int64_t n) { for (int64_t i = 0; i < n; ++i) y[i] = expression; }
UNARY(exp_low_, float, float, exp_low(x[i]))
UNARY(expm1_low_, float, float, expm1_low(x[i]))
UNARY(log1p_low_, float, float, log1p_low(x[i]))
UNARY(tanh_f_, float, float, tanh_f(x[i]))
UNARY(to_bf16_, uint16_t, float, to_bf16(x[i]).bits)
UNARY(to_f16_, uint16_t, float, to_f16(x[i]).bits)
UNARY(from_bf16_, float, uint16_t, to_float(bf16{x[i]}))
UNARY(from_f16_, float, uint16_t, to_float(f16{x[i]}))
UNARY(remainder_round_trip_, float, float, join_remainder(remainder_high(x[i]), remainder_low(x[i])))
"""
Call = Callable[[str, np.ndarray, type], np.ndarray]


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Call:
    """Return call(function, input, output dtype): math.h compiled with the flags of the CPU kernels."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("math")
    (folder / "math.cpp").write_text(SOURCE)
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-shared", "-fPIC"]
    command = [compiler, *flags, f"-I{ROOT / 'csrc'}", str(folder / "math.cpp"), "-o", str(folder / "m.so")]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "m.so"))

    def run(name: str, x: np.ndarray, out: type) -> np.ndarray:
        y = np.empty(x.shape, out)
        pointers = (x.ctypes.data_as(ctypes.c_void_p), y.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(x.size))
        getattr(library, name + "_")(*pointers)
        return y

    return run


def floats(low: float, high: float) -> np.ndarray:
    """Return every 977th fp32 value between low and high, both signs of zero and both ends included."""
    bits = np.arange(0, 0x7F800000, 977, dtype=np.uint32).view(np.float32)
    x = np.concatenate((-bits[::-1], bits, np.array([low, high], np.float32)))
    return x[(x >= low) & (x <= high)]


def test_exp(call: Call) -> None:
    x = floats(-87.33, 87.0)
    exact = np.exp(x.astype(np.float64))
    assert np.max(np.abs(call("exp_low", x, np.float32) / exact - 1)) <= 0.70 * U
    got = call("exp_low", np.array([-np.inf, -1e30, -88.0, np.nan, 0.0], np.float32), np.float32)
    assert got[:3].tolist() == [0, 0, 0] and np.isnan(got[3]) and got[4] == 1


def test_expm1_and_log1p(call: Call) -> None:
    for name, low, bound in (("expm1_low", -40.0, 1.0), ("log1p_low", -0.9999999, 1.7)):
        x = floats(low, 0.0)
        x = x[(x < -1e-37) & (x > low)]
        exact = getattr(np, name.removesuffix("_low"))(x.astype(np.float64))
        assert np.max(np.abs(call(name, x, np.float32) / exact - 1)) <= bound * U
        assert call(name, np.zeros(1, np.float32), np.float32)[0] == 0
    assert call("expm1_low", np.array([-np.inf], np.float32), np.float32)[0] == -1


def test_tanh(call: Call) -> None:
    x = floats(-20.0, 20.0)
    x = x[np.abs(x) > 1e-37]  # the relative error of a subnormal result is not meaningful
    exact = np.tanh(x.astype(np.float64))
    assert np.max(np.abs(call("tanh_f", x, np.float32) / exact - 1)) <= 1.26 * U
    edge = call("tanh_f", np.array([0.0, -0.0, np.inf, -np.inf, np.nan], np.float32), np.float32)
    assert edge[:4].tolist() == [0, 0, 1, -1] and np.signbit(edge[1]) and np.isnan(edge[4])


@pytest.mark.parametrize("name,dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_conversions_are_pytorchs(call: Call, name: str, dtype: torch.dtype) -> None:
    half = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    wide = torch.from_numpy(call(f"from_{name}", half.numpy().view(np.uint16), np.float32))
    torch.testing.assert_close(wide, half.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
    middle = torch.cat((wide, torch.nextafter(wide, wide + 1), wide * 1.001953125, wide * 1.00048828125))  # ties too
    x = torch.cat((middle, torch.from_numpy(floats(-3.4e38, 3.4e38)))).contiguous()
    got = torch.from_numpy(call(f"to_{name}", x.numpy(), np.uint16).view(np.int16)).view(dtype)
    torch.testing.assert_close(got, x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_remainder_holds_every_bit(call: Call) -> None:
    x = floats(-3.4e38, 3.4e38)
    assert np.array_equal(call("remainder_round_trip", x, np.float32).view(np.uint32), x.view(np.uint32))
    nan = np.array([0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(call("remainder_round_trip", nan, np.float32)).all()
