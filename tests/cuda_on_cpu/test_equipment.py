"""Check that the emulation of the CUDA kernels can fail: it must catch broken sources. Also what all kernels share.

Other tests show that the kernels are right: the emulation is the backend `cuda` of all tests on a machine without a GPU
(tests/conftest.py). Tests that compile broken or instrumented sources are slow: `make test-slow` runs them.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
from typing import Any

import pytest
import torch

from fastgpt.core import backend

if importlib.util.find_spec("pybind11") is None or shutil.which("g++") is None:
    pytest.skip("needs pybind11 and g++", allow_module_level=True)

import contract
import emulator

OPS = sorted(op for op, cells in backend.ops().items() if "cuda" in cells)


def digests(done: subprocess.CompletedProcess[str]) -> emulator.Digests:
    """Return the digests of a process; none if a kernel crashed it."""
    found: emulator.Digests = json.loads(done.stdout) if done.returncode == 0 else {}
    return found


@pytest.fixture(scope="module")
def right() -> Any:
    """Return right(op): the digests of the unchanged sources, each computed once."""
    found: dict[str, emulator.Digests] = {}

    def of(op: str) -> emulator.Digests:
        if op not in found:
            found[op] = digests(emulator.run(emulator.build(), op, {}))
        return found[op]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_orders_of_threads_agree_bitwise(op: str, right: Any) -> None:
    found = right(op)
    assert set(found) == set(emulator.SCHEDULES) and found["forward"] == found["backward"] == found["random"], found
    assert found["random"] and all(len(d) == 64 for d in found["random"]), found


# What is broken -> the op that shows it, the file, its text, the replacement
MUTATIONS = {
    f"{op}: {what}": (op, *m) for op, found in contract.gather("MUTATIONS", {}).items() for what, m in found.items()
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_caught(name: str, right: Any) -> None:
    """It shows in every order of threads: other bits, an error, or a crashed process."""
    op, *mutation = MUTATIONS[name]
    assert right(op).keys() == set(emulator.SCHEDULES)
    found = digests(emulator.run(emulator.build(mutate=tuple(mutation), op=op), op, right(op)))
    assert all(found.get(schedule) != digest for schedule, digest in right(op).items()), found


# ---- Poison: memory that was never written must not affect results ----

KERNELS = """
#include <cuda_runtime.h>
#include "core/cuda/launch.cuh"
#include "core/cuda/ptx.cuh"
using namespace fastgpt;
__global__ void write_kernel(float* out, bool all) {
  __shared__ float shared[32];
  if (all || threadIdx.x != 3) shared[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}
__global__ void copy_kernel(const float* in, float* out, bool wait) {
  FASTGPT_DYNAMIC_SHARED(float, tile);
  for (int i = 0; i < 8; ++i) tile[8 * threadIdx.x + i] = 1.0f;  // as what comes
  for (int i = 0; i < 8; i += 4) ptx::cp_async_16(ptx::shared_address(tile + 8 * threadIdx.x + i), in + i, 16);
  ptx::cp_async_commit();
  if (wait) ptx::cp_async_wait<0>();
  for (int i = 0; i < 8; ++i) out[8 * threadIdx.x + i] = tile[8 * threadIdx.x + i];
  ptx::cp_async_wait<0>();
}
extern "C" void write_all(float* out, bool all) { cuda::launch("write", write_kernel, {1}, 32, 0, {}, out, all); }
__global__ void contract_kernel(const float* in, float* out) {
  const float product = in[0] * in[1];
  out[0] = product, out[1] = in[0] * in[1] - product, out[2] = __fmul_rn(in[0], in[1]) - product;
}
extern "C" void contract(const float* in, float* out) {
  cuda::launch("contract", contract_kernel, {1}, 1, 0, {}, in, out);
}
extern "C" void copy_async(const float* in, float* out, bool wait) {
  cuda::launch("copy", copy_kernel, {1}, 2, 64, {}, in, out, wait);
}
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the functions of KERNELS, called with tensors."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "kernels.cu").write_text(KERNELS)
    include = [f"-I{p}" for p in (emulator.HERE / "include", emulator.CSRC)]
    flags = [*emulator.FLAGS, *emulator.ROUNDING, "-fvisibility=default", "-O1", "-shared", *include, "-x", "c++"]
    subprocess.run(["g++", *flags, str(folder / "kernels.cu"), "-o", str(folder / "kernels.so")], check=True)
    library = ctypes.CDLL(str(folder / "kernels.so"))

    def call(name: str, *values: Any) -> None:
        getattr(library, name)(*(ctypes.c_void_p(v.data_ptr()) if isinstance(v, torch.Tensor) else v for v in values))

    return call


def test_what_was_not_written_is_poison(small: Any) -> None:
    """This holds even where the previous block wrote the same place, and where a copy of the same values is in
    flight."""
    out = torch.empty(32)
    for all_written in (True, False):
        small("write_all", out, all_written)
        assert out.isnan().nonzero().flatten().tolist() == ([] if all_written else [3])
    out = torch.empty(2, 2, 4)
    for waits in (True, False):
        small("copy_async", torch.ones(8), out, waits)
        assert torch.equal(out.isnan().any(0), torch.tensor([[False], [not waits]]).expand(2, 4))


@pytest.mark.skipif(not emulator.HAS_FMA, reason="this processor has no FMA")
def test_products_go_into_sums_unrounded(small: Any) -> None:
    """Products are contracted as nvcc does, except where the source says otherwise."""
    x, out = torch.tensor([1.1, 1.3]), torch.empty(3)
    small("contract", x, out)
    assert out[1] == float(x[0]) * float(x[1]) - float(out[0]) != 0 == out[2]


# ---- AddressSanitizer: detects reads and writes outside of what the ops allocate ----


def run_under_asan(op: str, mutation: tuple[str, str, str] | None = None) -> subprocess.CompletedProcess[str]:
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not os.path.isabs(libraries[0]):
        pytest.skip("g++ comes without libasan")
    return emulator.run(emulator.build(emulator.ASAN, mutation, op), op, {}, preload=" ".join(libraries))


MINUTES = ("adamw", "attention_decode", "layer_norm", "rms_norm")  # the sanitizer compiles these longest


@pytest.mark.slow
@pytest.mark.parametrize("op", [pytest.param(op, marks=[pytest.mark.extended] * (op in MINUTES)) for op in OPS])
def test_address_sanitizer(op: str) -> None:
    done = run_under_asan(op)
    assert done.returncode == 0, done.stderr[-3000:]


# As above, for accesses outside of a tensor
ASTRAY = {f"{op}: {what}": (op, *m) for op, found in contract.gather("ASTRAY", {}).items() for what, m in found.items()}


@pytest.mark.extended
@pytest.mark.parametrize("name", ASTRAY)
def test_address_sanitizer_catches(name: str) -> None:
    op, *mutation = ASTRAY[name]
    done = run_under_asan(op, tuple(mutation))  # type: ignore[arg-type]
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-3000:]
