"""The model reads the machine code of every kernel: no opcode without a class, a way to the end, a bound."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastgpt.bench.model.bound import bound
from fastgpt.bench.model.chips import A100, H200, Chip
from fastgpt.bench.model.compiled import CSRC, of_cuda
from fastgpt.bench.model.launch import Launch
from fastgpt.bench.model.machine_code import Code
from fastgpt.bench.model.opcodes import unknown
from fastgpt.checks.cuda import find_nvcc

ARCHS = {"sm_80": A100, "sm_90a": H200}

TRITON = """
import itertools
from fastgpt.bench import codegen
from fastgpt.bench.model import compiled, opcodes
from fastgpt.checks import triton as check

jobs = codegen.some_of_each(check.jobs([80, 90], False, quick=True))
for module, mine in itertools.groupby(sorted(jobs, key=lambda job: job.module), lambda job: job.module):
    for job in [*mine][:{most}] if module in {modules} else []:
        kernel = compiled.of_triton(check.compiled(job))
        print(module, job.number, job.arch, *sorted(opcodes.unknown(kernel.code)))
"""


def problems(kernel: str, code: Code, chip: Chip) -> list[str]:
    """Return what the model does not understand of a kernel."""
    found = [f"{kernel}: {opcode}" for opcode in sorted(unknown(code))]
    result = bound(Launch(kernel, code, 1000, code.threads or 128, dram_read=1e9, dram_written=1e9), chip)
    if not (result.instructions and 0 < result.seconds["latency"] < 60):
        found.append(f"{kernel}: {result}")
    return found


def check_cuda(names: str) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = [(path, arch) for path in sorted(CSRC.glob(f"{names}/*.cu")) for arch in ARCHS]
        compiled = [*pool.map(lambda source: (source[1], of_cuda(*source)), sources)]
    found = [
        line for arch, codes in compiled for name, code in codes.items() for line in problems(name, code, ARCHS[arch])
    ]
    assert compiled and not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.nvcc
@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc here")
def test_cuda_kernels_of_an_op() -> None:
    check_cuda("swiglu")


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.nvcc
@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc here")
def test_every_cuda_kernel() -> None:
    check_cuda("*")


def check_triton(modules: set[str], most: int, folder: Path) -> None:
    """Compile up to `most` of the configurations that fastgpt.bench.codegen shows of each kernel file."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", TRITON.format(modules=sorted(modules), most=most)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0 and {line[0] for line in lines} == modules, done.stdout + done.stderr
    assert not [line for line in lines if len(line) > 3]


@pytest.mark.slow
def test_some_triton_kernels(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    check_triton({"attention", "swiglu"}, 3, tmp_path)


@pytest.mark.slow
@pytest.mark.extended
def test_every_triton_kernel(tmp_path: Path) -> None:
    triton_check = pytest.importorskip("fastgpt.checks.triton")
    check_triton(set(triton_check.MODULES), 1000, tmp_path)
