"""Launches of CUDA kernels without a GPU: the launchers of csrc run on the host and record instead of launching.

tests/cuda_on_cpu builds csrc for the host; its binding can plan: every launcher computes its grid, block and shared
memory from the tensors it gets, for a number of multiprocessors, and nothing runs. The tensors are large but never
touched: they are views of address space without memory.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import mmap
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastgpt.checks.cuda import ToolMissing, short_names

MAP_NORESERVE = 0x4000  # mmap has no name for it before Python 3.13
CPU_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


@dataclass(frozen=True)
class CudaLaunch:
    """One launch: the kernel as in 'layer_norm_fwd_kernel<bf16, bf16, 8>', and its sizes."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int  # dynamic, bytes of a block

    @property
    def name(self) -> str:
        """The kernel's name without template arguments."""
        return self.kernel.split("<")[0]

    @property
    def blocks(self) -> int:
        """Blocks of the launch."""
        return math.prod(self.grid)


def build(root: Path) -> Path:
    """Build csrc of a checkout for the host and return the library; objects are kept for later builds.

    Raises:
        ToolMissing: no checkout, no g++, no pybind11, or the build failed.
    """
    tool = root / "tests" / "cuda_on_cpu" / "emulator.py"
    if not tool.is_file():
        raise ToolMissing(f"{root} is not a checkout, whose tests/cuda_on_cpu builds the launchers for the host")
    if shutil.which("g++") is None or importlib.util.find_spec("pybind11") is None:
        raise ToolMissing("the launchers are built for the host by g++ and pybind11; pip install pybind11")
    done = subprocess.run([sys.executable, str(tool)], capture_output=True, text=True)
    if done.returncode != 0:
        raise ToolMissing(f"the build for the host failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return Path(done.stdout.strip().splitlines()[-1])


class Planner:
    """The launchers of a library that `build` returned, for a device of so many multiprocessors."""

    def __init__(self, library: Path, multiprocessors: int) -> None:
        self.module, self.names = _loaded(library)
        self.multiprocessors = multiprocessors
        self.space = _Space()

    def launches(self, op: Any, args: Any) -> tuple[list[CudaLaunch], list[str]]:
        """Return what a raw op launches for tensors like these (of any device), and the PyTorch ops that it calls."""
        given = tree_map_only(Tensor, self.space.like, args)
        self.begin()
        try:
            with _Calls() as calls, torch.no_grad():
                op.redispatch(CPU_KERNELS, *given)
        finally:
            found = self.end()
        return found, calls.names

    def begin(self, dry: bool = True) -> None:
        """Record launches from here on; unless `dry`, kernels run as well."""
        self.module.begin(self.multiprocessors, dry)

    def end(self) -> list[CudaLaunch]:
        """Return the launches since `begin`; kernels run again."""
        found = self.module.end()
        return [CudaLaunch(self.names[at], tuple(n[:3]), tuple(n[3:6]), n[6]) for at, n in found]


class _Calls(TorchDispatchMode):
    """Keeps the names of the PyTorch ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class _Space:
    """Address space for tensors that nobody reads; all of them begin at the same address."""

    def __init__(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)

    def like(self, t: Tensor) -> Tensor:
        """Return a CPU tensor with the shape, strides, dtype and offset of t."""
        last = sum((n - 1) * s for n, s in zip(t.shape, t.stride())) if t.numel() else 0
        needed = int((t.storage_offset() + last + 1) * t.element_size())
        if needed > self.bytes.numel():
            size = 2 * needed + mmap.PAGESIZE
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
            self.bytes = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.uint8)
        empty = torch.empty(0, dtype=t.dtype)
        return empty.set_(self.bytes.untyped_storage(), t.storage_offset(), t.shape, t.stride())


@functools.cache
def _loaded(library: Path) -> tuple[Any, dict[int, str]]:
    """Load the library, for its ops and as a module; return the module and the kernels by their offset."""
    torch.ops.load_library(str(library))
    spec = importlib.util.spec_from_file_location("kernels", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, _names(library)


def _names(library: Path) -> dict[int, str]:
    """Return the kernels by their offset in the library."""
    listed = subprocess.run(["nm", "--defined-only", str(library)], capture_output=True, text=True, check=True)
    symbols = dict(_symbols(listed.stdout))
    names = short_names(list(symbols))
    return {offset: names[mangled] for mangled, offset in symbols.items()}


def _symbols(text: str) -> Iterator[tuple[str, int]]:
    for line in text.splitlines():
        offset, _, name = line.split(" ", 2)
        if "_kernel" in name:
            yield name, int(offset, 16)
