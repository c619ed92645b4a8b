"""Proof that the emulation of the CUDA kernels can fail: broken sources must be caught. And what all kernels share.

That the kernels are right is shown elsewhere: the emulation is the backend `cuda` of all tests on a machine without a
GPU (tests/conftest.py).
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

import emulator

OPS = sorted(op for op, cells in backend.ops().items() if "cuda" in cells)


def digests(done: subprocess.CompletedProcess[str]) -> emulator.Digests:
    """A process that a kernel took down gives none."""
    found: emulator.Digests = json.loads(done.stdout) if done.returncode == 0 else {}
    return found


@pytest.fixture(scope="module")
def right() -> Any:
    """right(op): the digests of the sources as they are, each computed once."""
    found: dict[str, emulator.Digests] = {}

    def of(op: str) -> emulator.Digests:
        if op not in found:
            found[op] = digests(emulator.run(emulator.build(), op, {}))
        return found[op]

    return of


@pytest.mark.parametrize("op", OPS)
def test_orders_of_threads_agree_bitwise(op: str, right: Any) -> None:
    found = right(op)
    assert set(found) == set(emulator.SCHEDULES) and found["forward"] == found["backward"] == found["random"], found
    assert found["random"] and all(len(d) == 64 for d in found["random"]), found


# What is broken -> the op that shows it, the file, its text, what stands there instead
MUTATIONS: dict[str, tuple[str, str, str, str]] = {
    "barrier of a reduction": (
        "layer_norm",
        "core/cuda/reduce.cuh",
        "mine[n_warps + threadIdx.x / 32] = b;\n  }\n  __syncthreads();",
        "mine[n_warps + threadIdx.x / 32] = b;\n  }",
    ),
    "barrier of the partials' reduce": (
        "layer_norm",
        "core/cuda/partials.cuh",
        "sums[threadIdx.x][threadIdx.y] = sum;\n  __syncthreads();",
        "sums[threadIdx.x][threadIdx.y] = sum;",
    ),
    "barrier behind a broadcast": (
        "adamw",
        "adamw/cuda.cu",
        "begin == 0, sum);\n  __syncthreads();",
        "begin == 0, sum);",
    ),
    "shifted tail": (
        "cross_entropy",
        "core/cuda/vec.cuh",
        "i < head ? i : i + n_packs * L;",
        "i < head ? i : i + n_packs * L + 1;",
    ),
    "alignment": (
        "layer_norm",
        "core/cuda/vec.cuh",
        "if (!is_aligned(p)) return false;",
        "static_cast<void>(p);",
    ),
    "heads side by side": (
        "rope",
        "rope/cuda.cu",
        "for (int first = threadIdx.y; first < n_heads;",
        "for (int first = 0; first < n_heads;",
    ),
    "sign of a turn": ("rope", "rope/cuda.cu", "a * cos[l] - b * s;", "a * cos[l] + b * s;"),
    "barrier behind a tile's plan": ("embedding", "embedding/cuda.cu", "  __syncthreads();\n", ""),
    "run cut in its middle": (
        "embedding",
        "embedding/cuda.cu",
        "key == first && !(all_one && i + 1 > kTile / 2)",
        "key == first",
    ),
    "one level of partials": (
        "embedding",
        "embedding/cuda.cu",
        "while (tiles_of(level.n_rows) > 1)",
        "if (tiles_of(level.n_rows) > 1)",
    ),
    "lane that stays away": (
        "layer_norm",
        "layer_norm/cuda.cu",
        "row_sum2(sum, dot, scratch[set]);",
        "if (threadIdx.x != 5) row_sum2(sum, dot, scratch[set]);",
    ),
    "row that is written over while it is read": (
        "layer_norm",
        "layer_norm/cuda.cu",
        "ring.request_row(a, row + step, set ^ 1);",
        "ring.request_row(a, row + step, set);",
    ),
    "copy that is not waited for": ("rms_norm", "rms_norm/cuda.cu", "cp_async_wait<1>", "cp_async_wait<2>"),
    "barrier between rows' sums": (
        "rms_norm",
        "core/cuda/partials.cuh",
        "    if (!last) __syncthreads();\n",
        "",
    ),
    "row mask of a sum": (
        "bias_gelu",
        "bias_gelu/cuda.cu",
        "      if (row >= n_rows) continue;\n      float u",
        "      float u",
    ),
    "stride of a packed gradient": ("swiglu", "swiglu/cuda.cu", "a.dup) + row * a.grad_row", "a.dup) + row * a.n_cols"),
    "barrier before the scores": (
        "attention",
        "attention/cuda_fwd.cu",
        "    __syncthreads();  // these keys have come, and the values before them are done with\n",
        "",
    ),
    "barrier before the values": (
        "attention",
        "attention/cuda_fwd.cu",
        "    __syncthreads();  // these values have come, and the keys are done with\n",
        "",
    ),
    "copies that nobody waits for": (
        "attention",
        "attention/cuda_fwd.cu",
        "    ptx::cp_async_wait<0>();\n    __syncthreads();  // these values",
        "    __syncthreads();  // these values",
    ),
    "barrier of the queries' stages": (
        "attention",
        "attention/cuda_dkdv.cu",
        "    __syncthreads();  // these queries have come, and those of the other stage are done with\n",
        "",
    ),
    "barrier of the keys' stages": (
        "attention",
        "attention/cuda_bwd.cu",
        "    __syncthreads();  // these keys have come, and those of the other stage are done with\n",
        "",
    ),
    "causal mask": (
        "attention",
        "attention/cuda_fwd.cu",
        "const bool whole = key0 >= sight.from && key0 + kKeys <= sight.to;",
        "const bool whole = true;",
    ),
    "mask of the keys' gradients": (
        "attention",
        "attention/cuda_dkdv.cu",
        "const bool whole = first >= sight.from && first + 16 * kM <= sight.to;",
        "const bool whole = true;",
    ),
    "window": (
        "attention",
        "attention/mask.h",
        "begin = position + 1 - a.window;",
        "begin = position - a.window;",
    ),
    "last key": ("attention", "attention/cuda.cuh", "min(query + l.ahead,", "min(query + l.ahead + 1,"),
    "permutation of a tile on one side": (
        "attention",
        "core/cuda/tile.cuh",
        "(at ^ (32 * k & kTurned))",
        "(at + (32 * k & kTurned))",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_caught(name: str, right: Any) -> None:
    """In every order of threads: other bits, an error, or a process that died."""
    op, *mutation = MUTATIONS[name]
    assert right(op).keys() == set(emulator.SCHEDULES)
    found = digests(emulator.run(emulator.build(mutate=tuple(mutation), op=op), op, right(op)))
    assert all(found.get(schedule) != digest for schedule, digest in right(op).items()), found


# ---- Poison: what no one has written yet must not count ----

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
    """KERNELS' functions, called with tensors."""
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
    """Also where the block before has written the same place, and where a copy is on its way with the same values."""
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
    """As nvcc makes them, except where the source says otherwise."""
    x, out = torch.tensor([1.1, 1.3]), torch.empty(3)
    small("contract", x, out)
    assert out[1] == float(x[0]) * float(x[1]) - float(out[0]) != 0 == out[2]


# ---- AddressSanitizer: sees what is written or read outside of what the ops allocate ----


def run_under_asan(op: str, mutation: tuple[str, str, str] | None = None) -> subprocess.CompletedProcess[str]:
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not os.path.isabs(libraries[0]):
        pytest.skip("g++ comes without libasan")
    return emulator.run(emulator.build(emulator.ASAN, mutation, op), op, {}, preload=" ".join(libraries))


@pytest.mark.parametrize("op", OPS)
def test_address_sanitizer(op: str) -> None:
    done = run_under_asan(op)
    assert done.returncode == 0, done.stderr[-3000:]


# As above, for what goes outside of a tensor
ASTRAY: dict[str, tuple[str, str, str, str]] = {
    "row bound": ("layer_norm", "layer_norm/cuda.cu", "  if (row >= a.n_rows) return;\n", ""),
    "head bound": ("rope", "rope/cuda.cu", "return h < n_heads && (h", "return h <= n_heads && (h"),
    "token bound": ("embedding", "embedding/cuda.cu", "  if (i >= a.n_tokens) return;\n", ""),
    "table bound": ("embedding", "embedding/cuda.cu", "(i >= n || key == nothing)", "(i >= n)"),
    "column mask of a store": (
        "layer_norm",
        "layer_norm/cuda.cu",
        "    if (c >= a.n_cols) continue;\n    float y[L], w[L], b[L];",
        "    float y[L], w[L], b[L];",
    ),
    "column mask of a load": (
        "layer_norm",
        "norm/cuda.cuh",
        "if (c < n) load_raw(row + c, x[i]);",
        "load_raw(row + c, x[i]);",
    ),
    "row bound of a copy": (
        "rms_norm",
        "norm/cuda.cuh",
        "const int n = row < a.n_rows ? static_cast<int>(a.n_cols) : 0;",
        "const int n = static_cast<int>(a.n_cols);",
    ),
    "column bound of a tile": (
        "bias_gelu",
        "bias_gelu/cuda.cu",
        "  if (c >= a.n_cols) return;\n  Raw<T, L> x[kRows];",
        "  Raw<T, L> x[kRows];",
    ),
    "row mask of a tile": (
        "swiglu",
        "swiglu/cuda.cu",
        "    if (row >= a.n_rows) continue;\n    float g[L], dgate[L], dup[L];",
        "    float g[L], dgate[L], dup[L];",
    ),
}


@pytest.mark.parametrize("name", ASTRAY)
def test_address_sanitizer_catches(name: str) -> None:
    op, *mutation = ASTRAY[name]
    done = run_under_asan(op, tuple(mutation))  # type: ignore[arg-type]
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-3000:]
