"""Builds csrc/cuda/*.cu for the host, as a PyTorch library whose `cuda` ops take CPU tensors; and tries a build.

include/cuda_runtime.h says how kernels run. With FASTGPT_EMULATED_CUDA naming the library, fastgpt loads it and takes
its ops for the backend `cuda`: all of fastgpt/parity then runs on them. As a command:

    python tests/cuda_on_cpu/emulator.py                   builds, prints the library's path
    python tests/cuda_on_cpu/emulator.py LIBRARY OP ...    runs some parity cases of each op in every order of threads:
                                                           JSON, order -> digest of all outputs, or the first error

Objects are kept by the hash of all they are made of, in a folder that later runs find again. `mutate` replaces text in
the sources first: the tests of the equipment itself break a kernel that way.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CACHE = Path(tempfile.gettempdir()) / f"fastgpt-cuda-on-cpu-{os.getuid()}"
FLAGS = (
    "-std=c++20 -g1 -fPIC -fvisibility=hidden -fno-gnu-unique -fno-strict-aliasing -fno-math-errno -ffp-contract=off "
    "-Wall -Wno-unknown-pragmas -DFASTGPT_WITH_CUDA -DFASTGPT_EMULATED -DTORCH_TARGET_VERSION=0x020b000000000000"
).split()
ASAN = ("-fsanitize=address", "-fno-omit-frame-pointer")
SCHEDULES = ("forward", "backward", "random")
Mutation = tuple[str, str, str]  # file below csrc, text, replacement


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or "warning:" in done.stderr:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def _mutated(mutation: Mutation) -> Path:
    """A copy of csrc with this replacement."""
    root = CACHE / hashlib.sha256(repr(mutation).encode()).hexdigest()[:16] / "csrc"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(CSRC, root, ignore=shutil.ignore_patterns("cpu"))
    path = root / mutation[0]
    text = path.read_text()
    if text.count(mutation[1]) != 1:
        raise RuntimeError(f"{mutation[0]} holds {text.count(mutation[1])} times, expected once: {mutation[1]!r}")
    path.write_text(text.replace(mutation[1], mutation[2]))
    return root


def _texts(source: Path, folders: list[Path], seen: set[Path]) -> Iterator[str]:
    """The file and every header that it includes from these folders, each once."""
    text = source.read_text()
    yield text
    for name in re.findall(r'^\s*#include [<"]([^>"]+)[>"]', text, re.M):
        found = next((f / name for f in (source.parent, *folders) if (f / name).is_file()), None)
        if found is not None and found not in seen:
            seen.add(found)
            yield from _texts(found, folders, seen)


def _object(source: Path, root: Path, flags: list[str]) -> Path:
    folders = [HERE / "include", root / "include"]
    key = hashlib.sha256("\0".join([*_texts(source, folders, set()), *FLAGS, *flags]).encode()).hexdigest()[:24]
    target = CACHE / f"{source.stem}-{key}.o"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.o")
        include = [f"-I{folder}" for folder in folders]
        _run(["g++", *FLAGS, *flags, *include, "-x", "c++", "-c", str(source), "-o", str(partial)])
        partial.rename(target)
    return target


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")  # not imported: building needs its headers only
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def build(flags: tuple[str, ...] = (), mutate: Mutation | None = None) -> Path:
    """The library of all kernels, also a Python module; compiled where no object of the same text and flags is kept."""
    import pybind11

    CACHE.mkdir(exist_ok=True)
    torch = _torch()
    # pybind11 first: torch brings one of its own, which refuses to be used beside the stable ABI
    host = [f"-I{p}" for p in (pybind11.get_include(), torch / "include", sysconfig.get_path("include"))]
    with (CACHE / "lock").open("w") as lock, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for old in CACHE.glob("*-*"):
            if old.stat().st_mtime < time.time() - 86400:
                old.unlink()
        root = CSRC if mutate is None else _mutated(mutate)
        sources = [(p, ["-O1", *flags]) for p in sorted((root / "cuda").glob("*.cu"))]
        ours = [root / "ops_cuda.cpp", root / "registration.cpp", HERE / "binding.cpp"]
        sources += [(p, ["-O0", "-Wno-maybe-uninitialized", *flags, *host]) for p in ours]
        objects = list(pool.map(lambda s: _object(s[0], root, s[1]), sources))
        key = hashlib.sha256("".join(p.name for p in objects).encode()).hexdigest()[:24]
        target = CACHE / f"kernels-{key}.so"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.so")
            libraries = [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
            _run(["g++", "-shared", *flags, *map(str, objects), *libraries, "-o", str(partial)])
            partial.rename(target)
    return target


def load(path: Path) -> Any:
    """The library as a Python module (binding.cpp)."""
    spec = importlib.util.spec_from_file_location("kernels", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(library: Path, *ops: str, preload: str = "") -> subprocess.CompletedProcess[str]:
    """The second command at this file's head, in a process of its own, which a broken kernel may take down."""
    env = os.environ | {"FASTGPT_EMULATED_CUDA": str(library), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    if preload:
        env |= {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0"}
    command = [sys.executable, str(Path(__file__)), str(library), *ops]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


def some_cases(ops: list[str]) -> Iterator[Any]:
    """Cases of fastgpt/parity that take every branch on alignment and width, without the longest."""
    from fastgpt import parity

    layouts = ("contiguous/contiguous", "sliced/rows", "misaligned/contiguous", "contiguous/misaligned")
    for case in (case for op in ops for case in parity.cases(op)):
        size = math.prod(case.shape) // max(1, case.shape[2] if case.op == "attention" else 1)
        if case.layouts in layouts and str(case.dtype) != "torch.float16" and size < 20000:
            yield case


def try_ops(library: Path, schedule: str, ops: list[str]) -> str:
    """Digest of all outputs of some_cases with this order of threads, or the first error."""
    from fastgpt import parity
    from fastgpt.core import backend

    ctypes.CDLL(str(library)).fastgpt_set_schedule(SCHEDULES.index(schedule), 1)
    digest = hashlib.sha256()
    for case in some_cases(ops):
        inputs = parity.Inputs(case, "cpu", wide=False)
        subject = parity.SUBJECTS[case.op]
        if not backend.ops()[case.op]["cuda"].takes(case.dtype, 0):
            continue
        try:
            with backend.use(strict=True, **{case.op: "cuda"}):
                outputs = subject.run(case, subject.ours, inputs)
        except RuntimeError as error:
            return f"{case}: {error}"
        for t in outputs.values():
            digest.update(t.detach().double().numpy().tobytes())
        digest.update(repr(inputs.harmed()).encode())
    return digest.hexdigest()


def main(arguments: list[str]) -> None:
    """The two commands at this file's head."""
    if not arguments:
        print(build())
        return
    print(json.dumps({s: try_ops(Path(arguments[0]), s, arguments[1:]) for s in SCHEDULES}))


if __name__ == "__main__":
    main(sys.argv[1:])
