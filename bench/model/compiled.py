"""Machine code of CUDA sources and of Triton kernels, compiled here without a GPU."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from fastgpt.bench.model.machine_code import Code, of_cubin
from fastgpt.checks import cuda as cuda_check

CSRC = Path(__file__).resolve().parents[2] / "csrc"


class TritonKernel(NamedTuple):
    """A compiled configuration of a Triton kernel: dynamic_shared is in bytes of a block."""

    code: Code
    threads: int
    dynamic_shared: int


def of_cuda(source: Path, arch: str, include: Path = CSRC) -> dict[str, Code]:
    """Compile a .cu file for "sm_80" or "sm_90a" as `fastgpt.checks.cuda` does: kernel<types> -> code.

    Raises ToolMissing without nvcc or nvdisasm, RuntimeError with the compiler's output if it fails.
    """
    codes = of_cubin(cubin_of(source, arch, include))
    names = cuda_check.short_names(list(codes))
    return {names[mangled]: code for mangled, code in codes.items()}


def cubin_of(source: Path, arch: str, include: Path = CSRC) -> bytes:
    """Compile a .cu file as `of_cuda` does and return the cubin."""
    nvcc = cuda_check.find_nvcc()
    if nvcc is None:
        raise cuda_check.ToolMissing(cuda_check.REMEDY)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        done = cuda_check.compile_file(nvcc, source, arch, include, cubin)
        if done.returncode != 0:
            raise RuntimeError(f"{source} for {arch}:\n{done.stdout}{done.stderr}")
        return cubin.read_bytes()


def of_triton(kernel: Any) -> TritonKernel:
    """Return the machine code of a compiled Triton kernel, as `fastgpt.checks.triton.compiled(job)` returns it.

    Raises ToolMissing without nvdisasm.
    """
    (code,) = of_cubin(kernel.asm["cubin"]).values()
    return TritonKernel(code, 32 * kernel.metadata.num_warps, kernel.metadata.shared)
