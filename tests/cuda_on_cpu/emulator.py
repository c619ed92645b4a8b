"""Build csrc/*/*.cu for the host, as a PyTorch library whose `cuda` ops accept CPU tensors; and try a build.

include/cuda_runtime.h explains how kernels run. With FASTGPT_EMULATED_CUDA naming the library, fastgpt loads it and
uses its ops for the backend `cuda`: all of fastgpt/parity then runs on them. As a command:

    python tests/cuda_on_cpu/emulator.py                   builds, prints the library's path
    python tests/cuda_on_cpu/emulator.py LIBRARY OP FILE   runs some parity cases of the op in every order of threads:
                                                           JSON, order -> each case's digest of its outputs, or its
                                                           error, up to the first that differs from FILE; OP may
                                                           name a variant, as in attention:sm_90a

Objects are kept by the hash of everything that goes into them, in a folder that later runs reuse. `mutate` first
replaces text in the sources: the tests of this equipment break a kernel that way.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import platform
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
    "-std=c++20 -g1 -fPIC -fvisibility=hidden -fno-gnu-unique -fno-strict-aliasing -fno-math-errno "
    "-Wall -Wno-unknown-pragmas -DFASTGPT_WITH_CUDA -DFASTGPT_EMULATED -DTORCH_TARGET_VERSION=0x020b000000000000"
).split()
# Like nvcc by default, contract a product and the sum that uses it to one FMA, where this processor has it; gcc does so
# from -O2 on, or on request.
HAS_FMA = platform.machine() != "x86_64" or re.search(r"\bfma\b", Path("/proc/cpuinfo").read_text()) is not None
ROUNDING = ("-ffp-contract=off",)
if HAS_FMA:
    ROUNDING = ("-ffp-contract=fast", "-fexpensive-optimizations", *(("-mfma",) * (platform.machine() == "x86_64")))
ASAN = ("-fsanitize=address", "-fno-omit-frame-pointer")
SCHEDULES = ("forward", "backward", "random")
Mutation = tuple[str, str, str]  # file below csrc, text, replacement
Digests = dict[str, list[str]]  # order of threads -> digest of each case


def run_compiler(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or "warning:" in done.stderr:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def replace(root: Path, mutation: Mutation) -> None:
    """Make this replacement in a copy of csrc."""
    path = root / mutation[0]
    text = path.read_text()
    if text.count(mutation[1]) != 1:
        raise RuntimeError(f"{mutation[0]} holds {text.count(mutation[1])} times, expected once: {mutation[1]!r}")
    path.write_text(text.replace(mutation[1], mutation[2]))


def copy_kernels(root: Path) -> None:
    """Copy csrc without its C++ files."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(CSRC, root, ignore=shutil.ignore_patterns("*.cpp"))


def _mutated(mutation: Mutation) -> Path:
    """Return a copy of csrc with this replacement."""
    root = CACHE / hashlib.sha256(repr(mutation).encode()).hexdigest()[:16] / "csrc"
    copy_kernels(root)
    replace(root, mutation)
    return root


def _texts(source: Path, folders: list[Path], seen: set[Path]) -> Iterator[str]:
    """Return the file and every header that it includes from these folders, each once."""
    text = source.read_text()
    yield text
    for name in re.findall(r'^\s*#include [<"]([^>"]+)[>"]', text, re.M):
        found = next((f / name for f in (source.parent, *folders) if (f / name).is_file()), None)
        if found is not None and found not in seen:
            seen.add(found)
            yield from _texts(found, folders, seen)


def compiled(source: Path, flags: list[str], headers: tuple[Path, ...] = ()) -> Path:
    """Return the object of a file in a csrc (or of one for tests), with the headers of that csrc after `headers`.

    Two processes do not compile the same text at the same time.
    """
    folders = [*headers, HERE / "include", source.parents[1] if source.suffix == ".cu" else CSRC]
    key = hashlib.sha256("\0".join([*_texts(source, folders, set()), *FLAGS, *flags]).encode()).hexdigest()[:24]
    target = CACHE / f"{source.parent.name}-{source.stem}-{key}.o"
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.o")
            include = [f"-I{folder}" for folder in folders]
            run_compiler(["g++", *FLAGS, *flags, *include, "-x", "c++", "-c", str(source), "-o", str(partial)])
            partial.rename(target)
    return target


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")  # not imported: building needs only its headers
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def build(flags: tuple[str, ...] = (), mutate: Mutation | None = None, op: str = "*") -> Path:
    """Build the library of all kernels, also a Python module; reuse objects of the same text and flags.

    Only the kernels of `op` are compiled from mutated sources. They are linked first, because the linker keeps the
    first definition of an inline function that several objects contain.
    """
    import pybind11

    CACHE.mkdir(exist_ok=True)
    torch = _torch()
    # pybind11 first: torch ships its own copy, which refuses to be used together with the stable ABI
    host = [f"-I{p}" for p in (pybind11.get_include(), torch / "include", sysconfig.get_path("include"))]
    with (CACHE / "lock").open("w") as lock, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for old in CACHE.glob("*-*"):
            if old.stat().st_mtime < time.time() - 86400:
                old.unlink()
        kernels = sorted(CSRC.glob("*/*.cu"))
        if mutate is not None:
            broken = sorted(_mutated(mutate).glob(f"{op}/*.cu"))
            kernels = broken + [p for p in kernels if p.parent.name not in {b.parent.name for b in broken}]
        sources = [(p, ["-O1", *ROUNDING, *flags]) for p in kernels]
        ours = [*sorted(CSRC.glob("*/glue.cpp")), HERE / "binding.cpp"]
        # pybind11's thread-local variables are not shared memory and must not be placed there (cuda_runtime.h)
        options = ["-O0", "-Wno-maybe-uninitialized", "-Dthread_local=", *ROUNDING, *flags, *host]
        sources += [(p, options) for p in ours]
        objects = list(pool.map(lambda s: compiled(*s), sources))
        key = hashlib.sha256("".join(p.name for p in objects).encode()).hexdigest()[:24]
        target = CACHE / f"kernels-{key}.so"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.so")
            libraries = [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
            run_compiler(["g++", "-shared", *flags, *map(str, objects), *libraries, "-o", str(partial)])
            partial.rename(target)
    return target


def load(path: Path) -> Any:
    """Load the library as a Python module (binding.cpp)."""
    spec = importlib.util.spec_from_file_location("kernels", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernel_names(library: Path) -> dict[int, str]:
    """Return address in this process -> name, for each kernel of a library loaded here."""
    listed = subprocess.run(["nm", "-C", "--defined-only", str(library)], capture_output=True, text=True, check=True)
    symbols = [line.split(" ", 2) for line in listed.stdout.splitlines()]
    (at,) = (int(offset, 16) for offset, _, name in symbols if name == "fastgpt_set_schedule")
    here = ctypes.cast(ctypes.CDLL(str(library)).fastgpt_set_schedule, ctypes.c_void_p).value
    assert here is not None
    plain = re.compile(r"\(anonymous namespace\)::|fastgpt::|cuda::|^void ")
    code = [(int(o, 16), n) for o, kind, n in symbols if kind in "tTW" and "_kernel" in n]  # not a kernel's variables
    return {here - at + o: plain.sub("", n).split("(")[0] for o, n in code}


def run(library: Path, op: str, known: Digests, preload: str = "") -> subprocess.CompletedProcess[str]:
    """Run the second command of the module docstring in a new process, which a broken kernel may crash."""
    env = os.environ | {"FASTGPT_EMULATED_CUDA": str(library), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    if preload:
        env |= {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0"}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(known, file)
        file.flush()
        command = [sys.executable, str(Path(__file__)), str(library), op, file.name]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


def some_cases(op: str) -> Iterator[Any]:
    """Return cases of fastgpt/parity that take every branch on alignment and width, without the longest."""
    from fastgpt import parity

    layouts = ("contiguous/contiguous", "sliced/rows", "misaligned/contiguous", "contiguous/misaligned")
    for case in parity.cases(op):
        size = math.prod(case.shape) // max(1, case.shape[2] if case.op == "attention" else 1)
        if case.layouts in layouts and str(case.dtype) != "torch.float16" and size < 20000:
            yield case


def try_op(library: Path, op: str, schedule: str, known: list[str]) -> list[str]:
    """Return, for each of its cases with this order of threads, the digest of all outputs or the error; up to the
    first that differs from `known`."""
    import sm90_cases

    from fastgpt import parity
    from fastgpt.core import backend

    op, _, arch = op.partition(":")
    name = f"cuda:{arch}" if arch else "cuda"
    device = ctypes.CDLL(str(library))
    device.fastgpt_set_schedule(SCHEDULES.index(schedule), 1)
    device.fastgpt_set_chip(int(arch.strip("sm_a") or 80))
    subject, found = parity.SUBJECTS[op], list[str]()
    for case in sm90_cases.quick() if arch else some_cases(op):
        if not arch and not backend.ops()[op]["cuda"].takes(case.dtype, 0):
            continue
        inputs, digest = parity.Inputs(case, "cpu", wide=False), hashlib.sha256()
        try:
            with backend.use(strict=True, **{op: name}):
                outputs = subject.run(case, subject.ours, inputs)
            for t in outputs.values():
                digest.update(t.detach().double().numpy().tobytes())
            digest.update(repr(inputs.harmed()).encode())
            found.append(digest.hexdigest())
        except RuntimeError as error:
            found.append(f"{case}: {error}")
        if known and found != known[: len(found)]:
            break
    return found


def main(arguments: list[str]) -> None:
    """Run one of the two commands of the module docstring."""
    if not arguments:
        print(build())
        return
    library, op, file = arguments
    known: Digests = json.loads(Path(file).read_text())
    print(json.dumps({s: try_op(Path(library), op, s, known.get(s, [])) for s in SCHEDULES}))


if __name__ == "__main__":
    main(sys.argv[1:])
