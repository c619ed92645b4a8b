"""The race detector of the emulation: its rules, today's kernels, and races planted in them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

if shutil.which("g++") is None or shutil.which("addr2line") is None:
    pytest.skip("needs g++ and addr2line", allow_module_level=True)

import contract
import emulator
import races

OPS = sorted({path.parent.name for path in emulator.CSRC.glob("*/cuda*.cu")})  # some ops call kernels of others

# ---- the rules, in kernels of a few lines ----

KERNELS = """
#include <cuda_runtime.h>
#include <cstring>
#include "core/cuda/launch.cuh"
#include "core/cuda/ptx.cuh"
using namespace fastgpt;

float* const in = static_cast<float*>(std::aligned_alloc(16, 4096));
float* const out = static_cast<float*>(std::aligned_alloc(16, 4096));
__shared__ float tile[1024] __attribute__((aligned(16)));

__global__ void neighbour_kernel(int kind) {  // 64 threads; kind: what is between the write and the read
  const int i = threadIdx.x;
  tile[i] = 1.0f;
  if (kind == 1) __syncthreads();
  if (kind == 2) __syncwarp();
  if (kind == 3) __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  out[i] = tile[i ^ 1];  // of this warp
}

__global__ void far_kernel(bool whole_block) {
  const int i = threadIdx.x;
  tile[i] = 1.0f;
  whole_block ? __syncthreads() : __syncwarp();
  out[i] = tile[i ^ 32];  // of the other warp
}

__global__ void overwrite_kernel(bool barrier) {  // reads, then writes
  const float x = tile[threadIdx.x ^ 1];
  if (barrier) __syncthreads();
  tile[threadIdx.x] = x;
}

__global__ void halves_kernel() {  // neighbours in a word do not conflict
  reinterpret_cast<uint16_t*>(tile)[threadIdx.x] = 1;
}

__global__ void copy_kernel(bool wait, bool barrier, int neighbour) {
  const int i = 4 * threadIdx.x;
  ptx::cp_async_16(ptx::shared_address(tile + i), in + i, 16);
  ptx::cp_async_commit();
  if (wait) ptx::cp_async_wait<0>();
  if (barrier) __syncthreads();
  out[threadIdx.x] = tile[i ^ 4 * neighbour];
  ptx::cp_async_wait<0>();
}

__global__ void source_kernel(bool wait) {  // the source of a copy in flight is written
  ptx::cp_async_16(ptx::shared_address(tile), in, 16);
  ptx::cp_async_commit();
  if (wait) ptx::cp_async_wait<0>();
  in[0] = 1.0f;
  ptx::cp_async_wait<0>();
}

__global__ void twice_kernel(bool wait) {  // two copies to the same place
  ptx::cp_async_16(ptx::shared_address(tile), in, 16);
  ptx::cp_async_commit();
  if (wait) ptx::cp_async_wait<0>();
  ptx::cp_async_16(ptx::shared_address(tile), in + 4, 16);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

__global__ void matrices_kernel(bool barrier, int warps) {  // each row is loaded, then written by another lane
  const int lane = threadIdx.x % 32, row = lane + threadIdx.x / 32 % warps * 32;
  if (threadIdx.x < 32 || warps == 2) tile[4 * row] = 1.0f;
  __syncthreads();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, ptx::shared_address(tile + 4 * row));
  if (barrier) __syncthreads();
  if (threadIdx.x < 32) tile[4 * (lane ^ 1)] = 2.0f;
}

__global__ void blocks_kernel(int distance) { out[blockIdx.x * distance] = 1.0f; }

race::Order arrived;
__global__ void pass_on_kernel(bool acquires) {  // as an mbarrier does; threads run in order
  if (threadIdx.x == 0) tile[0] = 1.0f, race::release(arrived);
  if (threadIdx.x == 1) {
    if (acquires) race::acquire(arrived);
    out[0] = tile[0];
  }
}

#define RUN(kernel, blocks, threads, ...) \\
  if (std::strcmp(name, #kernel) == 0) \\
  cuda::launch(#kernel, kernel##_kernel, {blocks}, threads, 0, {} __VA_OPT__(,) __VA_ARGS__)

int main(int, char** arguments) {
  const char* const name = arguments[1];
  const int kind = std::atoi(arguments[2]);
  for (int schedule = 0; schedule < 3; ++schedule) {
    if (std::strcmp(name, "pass_on") != 0) emulator::machine().schedule = static_cast<emulator::Schedule>(schedule);
    try {
      RUN(neighbour, 1, 64, kind);
      RUN(far, 1, 64, kind == 1);
      RUN(overwrite, 1, 64, kind == 1);
      RUN(halves, 1, 64);
      RUN(copy, 1, 64, (kind & 1) != 0, (kind & 2) != 0, kind >> 2);
      RUN(source, 1, 1, kind == 1);
      RUN(twice, 1, 1, kind == 1);
      RUN(matrices, 1, 64, (kind & 1) != 0, 2 - (kind >> 1));
      RUN(blocks, 3, 1, kind);
      RUN(pass_on, 1, 2, kind == 1);
      std::puts("clean");
    } catch (const std::exception& e) {
      std::puts(e.what());
    }
  }
}
"""
RULES = {  # what the report contains, or "" without a race
    ("neighbour", 0): "race on shared memory: thread",
    ("neighbour", 1): "",
    ("neighbour", 2): "",
    ("neighbour", 3): "race on shared memory: thread",
    ("far", 0): "race on shared memory: thread",
    ("far", 1): "",
    ("overwrite", 0): "race on shared memory: thread",
    ("overwrite", 1): "",
    ("halves", 0): "",
    ("copy", 0): "an asynchronous copy of thread",  # nobody waits
    ("copy", 1): "",
    ("copy", 2): "an asynchronous copy of thread",  # a barrier does not wait for copies
    ("copy", 5): "an asynchronous copy of thread",  # another thread does not see that this one has waited
    ("copy", 7): "",
    ("source", 0): "an asynchronous copy of thread 0, which reads",
    ("source", 1): "",
    ("twice", 0): "an asynchronous copy of thread 0 writes at",
    ("twice", 1): "",
    ("matrices", 0): "",  # a warp's own loads come before what it does next
    ("matrices", 2): "ldmatrix of warp 1",  # another warp's do not
    ("matrices", 3): "",
    ("blocks", 0): "of another block, which writes at",
    ("blocks", 1): "",
    ("pass_on", 0): "race on shared memory: thread",
    ("pass_on", 1): "",
}


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rules")
    (folder / "rules.cu").write_text(KERNELS)
    include = [f"-I{p}" for p in (emulator.HERE / "include", emulator.CSRC)]
    for source, flags in ((folder / "rules.cu", ["-O1", *races.REPORTING]), (races.DETECTOR, ["-O2"])):
        flags = [*emulator.FLAGS, races.WITH, *flags, *include]
        target = folder / f"{source.stem}.o"
        emulator.run_compiler(["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(target)])
    emulator.run_compiler(["g++", *map(str, folder.glob("*.o")), "-o", str(folder / "rules")])
    return folder / "rules"


@pytest.mark.parametrize("name, kind", RULES)
def test_rules(rules: Path, name: str, kind: int) -> None:
    """Whether there is a race does not depend on the order in which threads run."""
    done = subprocess.run([str(rules), name, str(kind)], capture_output=True, text=True, check=True)
    found, wanted = done.stdout.splitlines(), RULES[name, kind]
    assert len(found) == 3, found
    for line in found:
        assert wanted in line and line.count("rules.cu:") == 2 if wanted else line == "clean", line


# ---- kernels ----


@pytest.mark.parametrize("op", OPS)
def test_kernels_have_no_races(op: str) -> None:
    done = races.run(races.build(op))
    assert done.returncode == 0 and done.stdout.count(": clean\n") > 1, done.stdout + done.stderr


OTHER_TYPES = [(op, element) for op in OPS for element in races.ELEMENTS.get(op, races.BOTH)]


@pytest.mark.parametrize(
    "op, element",
    [pytest.param(*t, marks=pytest.mark.slow if t[0] == "rms_norm" else pytest.mark.extended) for t in OTHER_TYPES],
)
def test_kernels_of_other_types_have_no_races(op: str, element: str) -> None:
    done = races.run(races.build(op, element=element))
    assert done.returncode == 0 and done.stdout.count(": clean\n") > 1, done.stdout + done.stderr


@pytest.mark.extended
def test_attention_of_every_head_dimension_has_no_races() -> None:
    done = races.run(races.build("attention", all_dims=True))
    assert done.returncode == 0 and done.stdout.count("head dimension") == 4, done.stdout + done.stderr


PLANTED = {f"{op}: {what}": (op, r) for op, found in contract.gather("RACES", {}).items() for what, r in found.items()}


def place(race: contract.Race, line: str) -> str:
    """Return file:line of the one place in the broken file where this text begins."""
    text = (emulator.CSRC / race.file).read_text().replace(race.text, race.broken)
    assert text.count(line) == 1, line
    return f"{race.file}:{text[: text.index(line)].count(chr(10)) + 1}"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if r.slow else []) for n, (_, r) in PLANTED.items()]
)
def test_a_planted_race_is_found(name: str) -> None:
    op, race = PLANTED[name]
    done = races.run(races.build(op, (race.file, race.text, race.broken), options=race.options))
    report = done.stdout.splitlines()[-1]
    assert done.returncode == 1 and f" launching {race.kernel}: race on " in report, done.stdout + done.stderr
    one, other = (re.findall(r"[\w/]+\.cuh?:\d+", p) for p in report.split("; nothing orders that after "))
    a, b = (place(race, line) for line in race.lines)
    assert (a in one and b in other) or (b in one and a in other), (a, b, report)


def test_order_comes_from_what_the_detector_models() -> None:
    """Kernels have no atomics and no fences but these two: of mbarriers for TMA, and of the registers of wgmma."""
    kernels = [*emulator.CSRC.glob("*/*.cu"), *emulator.CSRC.glob("**/*.cuh")]
    asm = re.compile(r"(?<![\w.])(?:atomic\w+|__threadfence\w*|(?:wgmma\.)?fence\.[\w.:]+|membar\.\w+|red\.\w[\w.:]*)")
    text = "\n".join(re.sub(r"//.*", "", path.read_text()) for path in kernels)
    assert set(asm.findall(text)) == {"fence.mbarrier_init.release.cluster", "wgmma.fence.sync.aligned"}


def test_every_kernel_with_shared_memory_has_a_planted_race() -> None:
    kernel = re.compile(r"__global__.*?(\w+_kernel)\((.*?)\n}\n", re.S)
    bodies = [m for p in emulator.CSRC.glob("**/cuda*/*.cuh") for m in kernel.findall(p.read_text())]
    bodies += [m for p in emulator.CSRC.glob("*/cuda*.cu") for m in kernel.findall(p.read_text())]
    shared = {name for name, body in bodies if "__shared__" in body or "FASTGPT_DYNAMIC_SHARED" in body}
    assert len(shared) >= 18 and shared <= {race.kernel for _, race in PLANTED.values()}
