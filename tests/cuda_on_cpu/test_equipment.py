"""Proof that the emulation of the CUDA kernels can fail: broken sources must be caught. And what all kernels share."""

from __future__ import annotations

import faulthandler
import importlib.util
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("pybind11")
if shutil.which("g++") is None:
    pytest.skip("g++ is not on PATH", allow_module_level=True)

PATH = Path(__file__).parent / "emulator.py"
spec = importlib.util.spec_from_file_location("cuda_on_cpu_emulator", PATH)
assert spec is not None and spec.loader is not None
emulator = importlib.util.module_from_spec(spec)
spec.loader.exec_module(emulator)

SCHEDULES = ("forward", "backward", "random")


@pytest.fixture(scope="module")
def kernels() -> Any:
    return emulator.Kernels(emulator.build())


def test_math(kernels: Any) -> None:
    exp_error, tanh_error = kernels.raw.math_errors(9973)
    assert exp_error <= 0.69 and tanh_error <= 1.25  # what math.h states
    for i, dtype in ((1, torch.bfloat16), (2, torch.float16)):
        bits = torch.randint(-(2**31), 2**31 - 1, (20000,)).to(torch.int32)
        special = torch.tensor([0.0, -0.0, 65519.9, 65520.0, 6e-8, 2.9e-8, math.inf, -math.inf, math.nan, 3.4e38])
        x = torch.cat([bits.view(torch.float32), torch.randn(20000), 1e-6 * torch.randn(5000), special])
        ours = torch.tensor([kernels.raw.round_trip(v, i) for v in x.tolist()])
        assert torch.equal(ours.nan_to_num(nan=12345.0), x.to(dtype).float().nan_to_num(nan=12345.0))
    for x in torch.randn(1000).tolist():
        assert kernels.raw.join_remainder(*kernels.raw.split_remainder(x)) == x


def results(kernels: Any, schedule: str) -> list[Tensor]:
    """All launchers on shapes that use warps, blocks, wide rows and tails."""
    found = []
    for shape in ((3, 97), (5, 1024), (3, 8200)):
        for dtype in (torch.float32, torch.bfloat16):
            found += emulator.smoke(kernels, dtype, *shape, schedule)
    return found


def test_schedules_agree_bitwise(kernels: Any) -> None:
    first, *others = [results(kernels, s) for s in SCHEDULES]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# Broken sources
MUTATIONS: dict[str, tuple[str, str, str]] = {
    "barrier of a reduction": (
        "include/fastgpt/reduce.cuh",
        "mine[n_warps + threadIdx.x / 32] = b;\n  }\n  __syncthreads();",
        "mine[n_warps + threadIdx.x / 32] = b;\n  }",
    ),
    "barrier of the partials' reduce": (
        "cuda/layer_norm.cu",
        "sums[threadIdx.x][threadIdx.y] = sum;\n  __syncthreads();",
        "sums[threadIdx.x][threadIdx.y] = sum;",
    ),
    "barrier behind a broadcast": ("cuda/adamw.cu", "begin == 0, sum);\n  __syncthreads();", "begin == 0, sum);"),
    "row bound": ("cuda/layer_norm.cu", "  if (row >= a.n_rows) return;\n", ""),
    "column mask": ("cuda/layer_norm.cu", "if (c < n) store_y", "store_y"),
    "shifted tail": (
        "include/fastgpt/vec.cuh",
        "i < head ? i : i + n_packs * L;",
        "i < head ? i : i + n_packs * L + 1;",
    ),
    "alignment": ("cuda/layer_norm.cu", "if (!is_aligned(p)) return false;", "static_cast<void>(p);"),
    "lane that stays away": (
        "cuda/layer_norm.cu",
        "row_sum2(sum, dot, scratch[set]);",
        "if (threadIdx.x != 5) row_sum2(sum, dot, scratch[set]);",
    ),
}


WRITES_ASTRAY = ("row bound", "column mask", "shifted tail")


def caught_by(right: list[Tensor], module: Path) -> str:
    """For each schedule y, n or - (another error): does it show a difference, a canary, misalignment, a deadlock?"""
    broken, caught = emulator.Kernels(module), ""
    for schedule in SCHEDULES:
        try:
            found = results(broken, schedule)
            caught += "n" if all(torch.equal(a, b) for a, b in zip(right, found, strict=True)) else "y"
        except (AssertionError, RuntimeError) as error:
            caught += "y" if any(w in str(error) for w in ("outside of a tensor", "misaligned", "deadlock")) else "-"
    return caught


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_caught(kernels: Any, name: str) -> None:
    """In a child process, which a broken kernel may take down: that counts as caught too."""
    right, module = results(kernels, "forward"), emulator.build(mutate=MUTATIONS[name])
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        try:
            os.write(write, caught_by(right, module).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        caught = pipe.read()
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert caught == "yyy" or (killed and name in WRITES_ASTRAY), caught


def run_under_asan(module: Path) -> subprocess.CompletedProcess[str]:
    """emulator.py's own shapes in a process of AddressSanitizer."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not os.path.isabs(libraries[0]):
        pytest.skip("g++ comes without libasan")
    env = os.environ | {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0"}
    command = [sys.executable, str(PATH), str(module)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def test_address_sanitizer() -> None:
    done = run_under_asan(emulator.build(emulator.ASAN))
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr[-3000:]


def test_address_sanitizer_catches_a_read_past_the_row() -> None:
    mutation = ("cuda/layer_norm.cu", "if (c >= n) continue;\n    load_h", "load_h")
    done = run_under_asan(emulator.build(emulator.ASAN, mutation))
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-3000:]
