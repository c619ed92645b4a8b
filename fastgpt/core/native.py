"""The compiled kernels, fastgpt._C: which are loaded, and why others are missing. Importing this never fails.

`BUILT` says which backends are loaded, `reason(backend)` why one is missing and how to fix it, `describe()` both for
`fastgpt doctor`. setup.py records the result of the build in fastgpt/_build_info.py.
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
    """Return the settings that setup.py wrote; empty if there are none."""
    try:
        info = importlib.import_module("fastgpt._build_info")
    except ImportError:
        return {}
    return {name: value for name, value in vars(info).items() if name.isupper()}


def _load() -> tuple[dict[str, bool], dict[str, str]]:
    """Import _C, which registers its kernels. Return backend -> loaded, and backend -> why not."""
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
    """Return why `backend` is missing and how to fix it; empty if it is loaded."""
    return _MISSING.get(backend, "")


def identity() -> str:
    """Return the digest of the sources that the kernels were compiled from; empty without compiled kernels."""
    return str(_INFO.get("SOURCES", ""))


def archs() -> list[str]:
    """Return the architectures that the CUDA kernels were compiled for, as in sm_90a."""
    return list(_INFO.get("ARCHS", []))


def _stale() -> str:
    """Return a note if this checkout's csrc/ differs from the sources of _C; empty outside a checkout."""
    found = sources_hash(Path(__file__).resolve().parents[2])
    same = not found or not any(BUILT.values()) or found == _INFO["SOURCES"]
    return "" if same else f"csrc/ changed since fastgpt._C was built: {REBUILD}"


def _driver_cuda() -> int:
    """Return the major CUDA release (such as 13) of this machine's driver; 0 if unknown."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value // 1000


def _on_this_gpu() -> list[str]:
    """Return notes on what this GPU or its driver cannot run as built."""
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
            f"cuda         the driver is for CUDA {driver}, but nvcc was {nvcc}: no CUDA kernel will run; update the "
            f"driver, or install nvcc {driver} and {REBUILD}"
        )
    return notes


def describe() -> list[str]:
    """Return lines for `fastgpt doctor`: the build's target, what is missing, why, and how to fix it."""
    lines = []
    if any(BUILT.values()):
        lines.append(f"native       built for torch {_INFO['TORCH']} on {_INFO['DATE']}, you have {torch.__version__}")
    if BUILT["cuda"]:
        lines.append(f"cuda         nvcc {_INFO['NVCC']}, {', '.join(_INFO['ARCHS'])}")
    lines += [f"{backend:<12} not available: {_MISSING[backend]}" for backend in NATIVE if not BUILT[backend]]
    return [*lines, *_on_this_gpu(), *filter(None, [_stale()])]


_INFO = _facts()
BUILT, _MISSING = _load()
