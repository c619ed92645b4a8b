"""Facts about the machine: default device, peak arithmetic rate, memory in use, versions for run headers."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from fastgpt._version import __version__
from fastgpt.core.cards import datasheet_peak
from fastgpt.core.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CUDNN_AT_ODD_LENGTHS = 91500  # 9.15.0; PyTorch prefers newer ones (check_prefer_cudnn_attention of its sdp_utils.cpp)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
MADV_HUGEPAGE, HUGE_PAGE = 14, 2**21  # sys/mman.h; bytes on x86-64
HUGE_FROM = 2**25  # bytes; glibc never keeps a larger block that was freed


def default_device(name: str = "auto") -> torch.device:
    """Return the device to train on: the requested one, or for auto a GPU if there is one. A GPU always has its number.

    Raises:
        UserError: the name is none of auto, cpu, cuda and cuda:N, or the machine has no such device.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    number = re.fullmatch(r"auto|cuda(?::(\d+))?", name)
    if number is None:
        raise UserError(f"device is {name!r}, expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number[1] or 0) >= count:
        raise UserError(f"device is {name!r}, but PyTorch finds {count or 'no'} CUDA devices here")
    return torch.device("cuda", torch.cuda.current_device() if number[1] is None else int(number[1]))


def dtype_of(name: str, device_type: str) -> torch.dtype:
    """Return the dtype for a setting; "auto" is bf16 on a GPU and fp32 on a CPU (most CPUs emulate bf16 slowly)."""
    return DTYPES[("bf16" if device_type == "cuda" else "fp32") if name == "auto" else name]


def keep_freed_memory() -> None:
    """Make this process reuse the CPU memory of freed tensors for later ones (glibc only; a no-op elsewhere).

    By default glibc returns large blocks to the system at once, so every step faults its tensors in page by page: a
    quarter of the time of a CPU step of GPT-2 124M at 256 tokens. The process holds its peak memory until it ends.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
        mallopt(parameter, value)


def return_freed_memory() -> None:
    """Return the CPU memory of freed tensors to the system now (glibc only; a no-op elsewhere)."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def _madvise() -> Any:
    """Return madvise of the C library, or None on another system than Linux."""
    if platform.system() != "Linux":
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise


def in_huge_pages(t: torch.Tensor) -> torch.Tensor:
    """Return new tensor t after asking Linux for huge pages for its memory, if it is a CPU tensor of at least HUGE_FROM
    bytes.

    Such a tensor gets fresh memory from the system each time, which is faulted in at the first write: 512 times less
    often with huge pages. Where the system does not have them, nothing changes. csrc/glue/allocate.h does the same for
    the tensors that kernels allocate.
    """
    if torch.compiler.is_compiling() or type(t) is not torch.Tensor or t.nbytes < HUGE_FROM or t.device.type != "cpu":
        return t
    start = -(-t.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (t.data_ptr() + t.nbytes) // HUGE_PAGE * HUGE_PAGE
    madvise = _madvise()
    if madvise is not None:
        madvise(start, end - start, MADV_HUGEPAGE)
    return t


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the peak FLOP/s for matrix products and the source of the figure: 'datasheet' or 'measured'."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        peak = datasheet_peak(torch.cuda.get_device_name(device))
        if peak is not None:
            return peak, "datasheet"
    n, most = (8192, 8192) if device.type == "cuda" else (256, 1024)
    while (seconds := _product_seconds(n, device, dtype)) < 0.02 and n < most:  # a CPU may be slow in fp16
        n *= 2
    return 2 * n**3 / seconds, "measured"


def _product_seconds(n: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return the seconds of the fastest of five products of (n, n) matrices."""
    own = torch.Generator(device).manual_seed(0)  # the global one is the run's, and part of its checkpoints
    a = torch.randn(n, n, device=device, dtype=dtype, generator=own)
    best = float("inf")
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def total_memory(device: torch.device) -> int:
    """Return the bytes of memory of a GPU, or of this machine (less if a control group allows less; 0 if unknown)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # a system without them
        return 0
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text(encoding="utf-8").strip() if limit.exists() else "max"
    return min(total, int(allowed)) if allowed.isdigit() else total


def memory_gb(device: torch.device) -> float:
    """Return the peak memory so far in GB: of the device's allocator on a GPU, of the process (Linux, else 0) on a
    CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM:")), 0.0)


def nvml(device: torch.device) -> tuple[Any, Any]:
    """Return NVIDIA's management library and its handle for a GPU, found by UUID because NVML and CUDA may number GPUs
    differently.

    Raises any error of the library, and ImportError without nvidia-ml-py.
    """
    import pynvml

    pynvml.nvmlInit()
    return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode())


def energy_joules(device: torch.device) -> float | None:
    """Return a GPU's energy counter, in joules since its driver was loaded; None if it cannot be read."""
    if device.type != "cuda":
        return None
    try:
        library, handle = nvml(device)
        return float(library.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    except Exception:  # an old GPU, a missing package or library: a run does without
        return None


@functools.cache
def cpu_name() -> str:
    """Return the name that the processor reports."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


@functools.cache
def package_version(name: str) -> str:
    """Return the version of an installed package without importing it; empty if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return versions and device for the header of a run or a result."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "fastgpt": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "system": platform.system(),
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """Return the commit of the checkout that fastgpt runs from; None when installed as a wheel."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def library_attention() -> str:
    """Return which of its fused attentions PyTorch tries first on this GPU for 16 bits, as in "cuDNN first".

    PyTorch (2.10 and newer) puts cuDNN before flash on compute capability 9 and 10, if cuDNN is newer than 9.15.0:
    older ones are wrong at lengths that 128 does not divide. Its order is used as it is.
    """
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        return "flash first"
    version = torch.backends.cudnn.version() or 0
    if version <= CUDNN_AT_ODD_LENGTHS:
        found = ".".join(map(str, (version // 10000, version // 100 % 100, version % 100)))
        return f"flash first: cuDNN is {found}, PyTorch prefers 9.15.1 and newer"
    if os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") == "1":
        return "flash first, as TORCH_CUDNN_SDPA_DEPRIORITIZED=1 says"
    return "cuDNN first" if torch.backends.cuda.cudnn_sdp_enabled() else "flash first: cuDNN's attention is turned off"
