"""Machine code of the kernels that were recorded, compiled for a chip; cubins are kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastgpt.bench.codegen import nvcc_version
from fastgpt.bench.model.compiled import cubin_of
from fastgpt.bench.model.cuda_launches import CudaLaunch
from fastgpt.bench.model.machine_code import Code, of_cubin
from fastgpt.bench.model.triton_launches import TritonLaunch, cubin
from fastgpt.checks.cuda import FLAGS, REMEDY, ToolMissing, find_nvcc, short_names
from fastgpt.core import cache

ARCHS = {80: "sm_80", 90: "sm_90a"}


class Instances:
    """Machine code for one chip. csrc: the folder of the CUDA kernels."""

    def __init__(self, csrc: Path, capability: int) -> None:
        self.csrc, self.capability = csrc, capability
        self.of_op: dict[str, dict[str, Code]] = {}  # folder of csrc -> kernel, as CudaLaunch names it -> code
        self.of_triton: dict[tuple[Any, ...], tuple[Code, int]] = {}

    def prepare(self, ops: Iterable[str]) -> None:
        """Compile the CUDA kernels of these ops, several files at a time.

        Raises:
            ToolMissing: there is no nvcc or no nvdisasm.
            RuntimeError: nvcc refuses a file; the message has its output.
        """
        files = [f for op in sorted(set(ops) - set(self.of_op)) for f in sorted((self.csrc / op).glob("*.cu"))]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for file, codes in zip(files, pool.map(self._compiled, files), strict=True):
                self.of_op[file.parent.name] = self.of_op.get(file.parent.name, {}) | codes

    def cuda(self, op: str, launch: CudaLaunch) -> Code:
        """Return the code of a kernel of an op that `prepare` compiled."""
        return self.of_op[op][launch.kernel]

    def triton(self, launch: TritonLaunch) -> tuple[Code, int]:
        """Compile what a Triton launch would; return the code and the bytes of shared memory of a program."""
        key = launch.instance
        if key not in self.of_triton:
            binary, shared = cubin(launch, self.capability)
            (code,) = of_cubin(binary).values()
            self.of_triton[key] = code, shared
        return self.of_triton[key]

    def _compiled(self, file: Path) -> dict[str, Code]:
        """Return the code of a file's kernels; compile it unless that was done before."""
        nvcc = find_nvcc()
        if nvcc is None:
            raise ToolMissing(REMEDY)
        headers = sorted(p for p in self.csrc.rglob("*") if p.suffix in (".h", ".cuh"))
        text = b"".join(p.read_bytes() for p in (file, *headers))
        arch = ARCHS[self.capability]
        key = hashlib.sha256(f"{nvcc_version(nvcc)} {arch} {FLAGS}".encode() + text).hexdigest()[:24]
        kept = cache.folder() / "cubins" / f"{file.parent.name}-{file.stem}-{key}.cubin"
        if not kept.exists():
            binary = cubin_of(file, arch, self.csrc)
            kept.parent.mkdir(parents=True, exist_ok=True)
            aside = kept.with_suffix(f".{os.getpid()}")
            aside.write_bytes(binary)
            aside.replace(kept)
        codes = of_cubin(kept)
        names = short_names(list(codes))
        return {names[mangled]: code for mangled, code in codes.items()}
