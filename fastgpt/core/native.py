"""The compiled kernels, fastgpt._C: which are here, and why any are not. Importing this never fails.

`BUILT` says which backends are loaded, `reason(backend)` why one is not and what to do, `describe()` both for
`fastgpt doctor`. What the build found is in fastgpt/_build_info.py, written by setup.py.
"""

from __future__ import annotations

import ctypes
import importlib
from pathlib import Path
from typing import Any

import torch

from fastgpt.core.sources import sources_hash

NATIVE = ("cpu", "cuda")
MIN_TORCH = (2, 11)  # the stable ABI that _C is built on
REBUILD = "pip install --no-build-isolation -e . (in the checkout, with torch installed)"


def _facts() -> dict[str, Any]:
    """What setup.py wrote, empty where there is nothing."""
    try:
        info = importlib.import_module("fastgpt._build_info")
    except ImportError:
        return {}
    return {name: value for name, value in vars(info).items() if name.isupper()}


def _load() -> tuple[dict[str, bool], dict[str, str]]:
    """Import _C, which registers its kernels: backend -> loaded, backend -> why not."""
    built, missing = _INFO.get("BUILT", []), dict(_INFO.get("MISSING", {}))
    if not _INFO:
        missing = dict.fromkeys(NATIVE, f"fastgpt was not installed by its setup.py; {REBUILD}")
    elif built:
        failure = None
        if tuple(int(n) for n in torch.__version__.split(".")[:2]) < MIN_TORCH:
            failure = f"torch {torch.__version__} is older than 2.11, which fastgpt._C needs; pip install -U torch"
        else:
            try:
                importlib.import_module("fastgpt._C")
            except Exception as error:  # ImportError, OSError from the loader, RuntimeError from registration
                failure = f"fastgpt._C does not load ({error}); it was built for torch {_INFO['TORCH']}; {REBUILD}"
        if failure is not None:
            missing.update(dict.fromkeys(built, failure))
            built = []
    return {b: b in built for b in NATIVE}, {b: missing.get(b, "not built") for b in NATIVE if b not in built}


def reason(backend: str) -> str:
    """Why `backend` is not here and the remedy; empty if it is."""
    return _MISSING.get(backend, "")


def identity() -> str:
    """Which sources the compiled kernels are of; empty without any."""
    return str(_INFO.get("SOURCES", ""))


def _stale() -> str:
    """A note if this checkout's csrc/ is newer than _C; empty outside a checkout."""
    found = sources_hash(Path(__file__).resolve().parents[2])
    same = not found or not any(BUILT.values()) or found == _INFO["SOURCES"]
    return "" if same else f"csrc/ changed since fastgpt._C was built: {REBUILD}"


def _driver_cuda() -> int:
    """The CUDA release, as in 13, that this machine's driver is of; 0 where it does not say."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value // 1000


def _on_this_gpu() -> list[str]:
    """What the GPU at hand, or its driver, cannot run as it was built."""
    if not BUILT["cuda"] or not torch.cuda.is_available():
        return []
    notes, (major, minor) = [], torch.cuda.get_device_capability()
    if major not in {int(a[3:].rstrip("af")) // 10 for a in _INFO["ARCHS"] if a.startswith("sm_")}:
        notes.append(
            f"cuda         nothing was compiled for sm_{major}{minor}: the driver compiles PTX at each kernel's first "
            f"use, which takes minutes once; TORCH_CUDA_ARCH_LIST={major}.{minor} {REBUILD}"
        )
    driver, nvcc = _driver_cuda(), int(_INFO["NVCC"].split(".")[0])
    if 0 < driver < nvcc:
        notes.append(
            f"cuda         the driver is of CUDA {driver}, nvcc was of {nvcc}: no CUDA kernel will run; update the "
            f"driver, or take nvcc {driver} and {REBUILD}"
        )
    return notes


def describe() -> list[str]:
    """Lines for `fastgpt doctor`: built for what, what is missing, why, and the remedy."""
    lines = []
    if any(BUILT.values()):
        lines.append(f"native       built for torch {_INFO['TORCH']} on {_INFO['DATE']}, you have {torch.__version__}")
    if BUILT["cuda"]:
        lines.append(f"cuda         nvcc {_INFO['NVCC']}, {', '.join(_INFO['ARCHS'])}")
    lines += [f"{backend:<12} not here: {_MISSING[backend]}" for backend in NATIVE if not BUILT[backend]]
    return [*lines, *_on_this_gpu(), *filter(None, [_stale()])]


_INFO = _facts()
BUILT, _MISSING = _load()
