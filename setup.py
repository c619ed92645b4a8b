"""Build fastgpt._C from the CPU and CUDA kernels in csrc/, and install fastgpt with or without it.

With torch present (`pip install --no-build-isolation -e .`) both halves are built where a C++ compiler and nvcc are
found. Whatever cannot be built is left out, and the last line names it, the reason and the remedy; `fastgpt doctor`
repeats it.

Environment: FASTGPT_CUDA=0 (CPU kernels only), 1 (anything less than everything is an error), auto (default);
FASTGPT_NO_EXT=1 (pure Python); CUDA_HOME; TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX"); MAX_JOBS (default: cores); CXX.
"""

from __future__ import annotations

import datetime
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import PlatformError

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = (2, 11)  # the stable ABI of this release: one binary works with it and every later one
CPU_SOURCES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.cpp"))
CUDA_SOURCES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.cu"))
sources_hash = runpy.run_path(str(ROOT / "fastgpt" / "core" / "sources.py"))["sources_hash"]
DEFAULT_ARCHS = "8.0+PTX;9.0a"  # A100; H100 and H200; PTX for all other cards from 8.0 on
LEAST_ARCH = 80  # the kernels use instructions of 8.0
USUAL_NVCC = "/usr/local/cuda/bin/nvcc"  # not on the PATH of a shell that reads no profile; PyTorch looks there, too
REBUILD = "pip install --no-build-isolation -e ."


class Unbuildable(Exception):
    """Raised with the reason why a backend cannot be built here, and the remedy."""


class Facts:
    """What this build found and did: printed last, and written to fastgpt/_build_info.py."""

    def __init__(self) -> None:
        self.built: list[str] = []
        self.missing: dict[str, str] = {}  # backend -> reason and remedy
        self.torch = self.nvcc = ""
        self.archs: list[str] = []
        self.notes: list[str] = []  # what the last line says in addition to what was built

    def leave_out(self, backend: str, why: str) -> None:
        if wanted("FASTGPT_CUDA", "auto") == "1":
            raise PlatformError(f"fastgpt: FASTGPT_CUDA=1, but the {backend} kernels cannot be built: {why}")
        self.missing.setdefault(backend, why)

    def write(self, folder: Path) -> None:
        """Write _build_info.py into `folder`, the package's folder."""
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        utc = datetime.timezone.utc
        when = datetime.datetime.fromtimestamp(int(epoch), utc) if epoch else datetime.datetime.now(utc)
        lines = [
            '"""What setup.py built here; setup.py writes this file, and fastgpt.core.native reads it."""',
            f"TORCH = {self.torch!r}",
            f"NVCC = {self.nvcc!r}",
            f"ARCHS = {self.archs!r}",
            f"DATE = {when.strftime('%Y-%m-%d %H:%M UTC')!r}",
            f"BUILT = {self.built!r}",
            f"MISSING = {self.missing!r}",
            f"SOURCES = {sources_hash(ROOT) if self.built else ''!r}",
        ]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build_info.py").write_text("\n".join(lines) + "\n")

    def summary(self) -> str:
        built = f"built the {' and '.join(self.built)} kernels" if self.built else "pure Python install"
        left_out = (f"left out {b}: {why}" for b, why in self.missing.items())
        return "; ".join([f"fastgpt: {built}", *self.notes, *left_out])


def wanted(name: str, default: str) -> str:
    """Read a switch from the environment and check it."""
    value = os.environ.get(name, "").lower() or default
    if value not in ("0", "1", "auto"):
        raise PlatformError(f"fastgpt: {name}={value!r}, expected 0, 1 or auto")
    return value


def find_torch() -> Any:
    """Import torch and check that it is new enough for the ABI this is built on."""
    try:
        import torch
        import torch.utils.cpp_extension
    except ImportError:
        raise Unbuildable(f"torch is not importable in the build; run `pip install torch`, then `{REBUILD}`") from None
    version = tuple(int(n) for n in torch.__version__.split(".")[:2])
    if version < TORCH_TARGET:
        raise Unbuildable(f"torch {torch.__version__} is older than 2.11; run `pip install -U torch`, then `{REBUILD}`")
    return torch


def find_compiler() -> None:
    """Check that the C++ compiler that setuptools will call exists."""
    command = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    if shutil.which(shlex.split(command)[0]) is None:
        raise Unbuildable(f"no C++ compiler ({command}); install g++ (or set CXX), then `{REBUILD}`")


def find_cuda_home() -> Path:
    """Return the toolkit's folder: CUDA_HOME, or what nvcc itself reports (on PATH it may be a wrapper or a link)."""
    remedy = f"install the CUDA toolkit or set CUDA_HOME to its folder, then `{REBUILD}`"
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(name):
            if (Path(home) / "bin" / "nvcc").is_file():
                return Path(home)
            raise Unbuildable(f"{name}={home} has no bin/nvcc; {remedy}")
    nvcc = shutil.which("nvcc") or (USUAL_NVCC if Path(USUAL_NVCC).is_file() else None)
    if nvcc is None:
        raise Unbuildable(f"nvcc was not found; {remedy}")
    dryrun = subprocess.run([nvcc, "-v", "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", dryrun, re.M)
    home_path = Path(top.group(1).strip()).resolve() if top else Path(nvcc).resolve().parent.parent
    if not (home_path / "bin" / "nvcc").is_file():
        raise Unbuildable(f"{nvcc} does not report its toolkit's folder; {remedy}")
    return home_path


ARCH = re.compile(r"(\d+)\.(\d[af]?)(\+PTX)?")


def known_archs(nvcc: Path) -> set[int]:
    """Return the architectures this nvcc compiles for, as in 90; empty if it does not report them."""
    said = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    return {int(n) for n in re.findall(r"compute_(\d+)", said)}


def choose_archs(known: set[int]) -> tuple[str, str]:
    """Return the architectures to compile for, and a note if they are fewer than TORCH_CUDA_ARCH_LIST asks for.

    A single architecture that does not compile would fail the whole extension, and the user may not have chosen the
    list: images preset it to everything that their torch was built for.
    """
    asked = [a for a in re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")) if a]
    kept: list[str] = []
    dropped: list[str] = []
    for arch in asked:
        found = ARCH.fullmatch(arch)
        if found is None:
            raise PlatformError(f"fastgpt: TORCH_CUDA_ARCH_LIST holds {arch!r}, expected numbers like 8.0 or 9.0a+PTX")
        number = int(found[1] + found[2].rstrip("af"))
        (kept if number >= LEAST_ARCH and (not known or number in known) else dropped).append(arch)
    if not dropped:
        return ";".join(kept) or DEFAULT_ARCHS, ""
    why = f"not {', '.join(dropped)} of TORCH_CUDA_ARCH_LIST (the kernels need 8.0 or newer, supported by nvcc)"
    return (";".join(kept), why) if kept else (DEFAULT_ARCHS, f"{why}: {DEFAULT_ARCHS} instead")


def gencode_flags(archs: str) -> list[str]:
    """Convert an architecture list such as 8.0;9.0a+PTX to flags of nvcc."""
    flags = []
    for arch in archs.split(";"):
        found = ARCH.fullmatch(arch)
        assert found is not None, arch
        number = found[1] + found[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if found[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def native_extension(torch: Any, cuda_home: Path | None, archs: str) -> Extension:
    """Return the extension for BuildExtension; .cu sources in a CppExtension, so a CPU-only torch builds them too."""
    torch_include = Path(torch.__file__).parent / "include"
    prefix_maps = [f"-ffile-prefix-map={ROOT}/=", f"-ffile-prefix-map={torch_include}/="]
    target = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
    cxx = ["-O3", "-g0", "-fvisibility=hidden", "-fopenmp-simd", target, *prefix_maps]
    # False alarms of gcc: std::optional of a shared_ptr; vectors between inlined functions. clang knows only the
    # second.
    cxx += ["-Wno-maybe-uninitialized", "-Wno-psabi", "-Wno-unknown-warning-option"]
    # errno and FP traps are never read, and either would keep loops scalar; NaN, infinity and order of sums stay exact.
    # No contraction into FMA: a*b - c with c = a*b rounded must be 0 on every CPU.
    cxx += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
    sources, options = list(CPU_SOURCES), {"cxx": cxx}
    kwargs: dict[str, Any] = {"extra_link_args": ["-Wl,--no-as-needed", "-ltorch"] if sys.platform == "linux" else []}
    if cuda_home is not None:
        torch.utils.cpp_extension.CUDA_HOME = str(cuda_home)
        sources += CUDA_SOURCES
        cxx.append("-DFASTGPT_WITH_CUDA")
        host = ",".join(["-fvisibility=hidden", *prefix_maps])
        options["nvcc"] = ["-O3", "-lineinfo", "-Xcompiler", host, *gencode_flags(archs)]
        # link cudart statically: torch may or may not bring libcudart
        kwargs["libraries"] = ["cudart_static", "rt", "dl", "pthread"]
        kwargs["library_dirs"] = [str(p) for p in (cuda_home / "lib64", cuda_home / "lib") if p.is_dir()]
        kwargs["include_dirs"] = [str(cuda_home / "include")]
    kwargs.setdefault("include_dirs", []).append(str(ROOT / "csrc"))
    return torch.utils.cpp_extension.CppExtension(
        "fastgpt._C", sources, extra_compile_args=options, py_limited_api=True, **kwargs
    )


class BuildNative(build_ext):
    """build_ext that determines what can be built and passes that to torch's BuildExtension."""

    def run(self) -> None:
        os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
        os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])  # ninja
        facts.built, facts.missing = [], {}
        extension = self._build()
        self.extensions = [extension] if extension else []
        self.distribution.ext_modules = self.extensions or None  # None: the wheel is tagged as pure Python
        place_build_info(self.inplace or self.editable_mode, Path(self.build_lib))

    def _build(self) -> Extension | None:
        try:
            torch = find_torch()
            find_compiler()
        except Unbuildable as why:
            facts.leave_out("cpu", str(why))
            facts.leave_out("cuda", "for the same reason as cpu")
            return None
        facts.torch = torch.__version__
        if wanted("FASTGPT_CUDA", "auto") == "0":
            facts.missing["cuda"] = f"FASTGPT_CUDA=0 was set; `FASTGPT_CUDA=auto {REBUILD}` builds it"
            return self._compile(torch, None)
        try:
            home = find_cuda_home()
            if not CUDA_SOURCES:
                raise Unbuildable("csrc/*/*.cu not found in the sources")
        except Unbuildable as why:
            facts.leave_out("cuda", str(why))
            return self._compile(torch, None)
        return self._compile(torch, home) or self._compile(torch, None)

    def _compile(self, torch: Any, cuda_home: Path | None) -> Extension | None:
        """Compile and place one extension; return None, with the reason noted, if that fails."""
        archs, note = choose_archs(known_archs(cuda_home / "bin" / "nvcc")) if cuda_home else ("", "")
        extension = native_extension(torch, cuda_home, archs)
        command = torch.utils.cpp_extension.BuildExtension(self.distribution)
        self.distribution.ext_modules = [extension]
        command.inplace, command.editable_mode = self.inplace, self.editable_mode
        command.build_lib, command.build_temp = self.build_lib, self.build_temp
        half = "cuda" if cuda_home else "cpu"
        try:
            command.ensure_finalized()
            command.run()
        except (Exception, SystemExit) as error:  # torch, setuptools, ninja and the compilers raise different ones
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            facts.leave_out(half, f"compiling failed ({first}); the log above says why; fix that, then `{REBUILD}`")
            return None
        facts.built = ["cpu", "cuda"] if cuda_home else ["cpu"]
        if cuda_home:
            release = subprocess.run([cuda_home / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
            facts.nvcc = (re.findall(r"V([\d.]+)", release) or ["unknown"])[0]
            facts.notes = [f"cuda for {archs}", note] if note else []
            facts.archs = [flag.rsplit("=", 1)[1] for flag in gencode_flags(archs)]
        return command.extensions[0]


def place_build_info(inplace: bool, build_lib: Path) -> None:
    """Write _build_info.py next to the package's modules: in the checkout if that will be imported, else in the
    build."""
    facts.write(ROOT / "fastgpt" if inplace else build_lib / "fastgpt")


class BuildPython(build_py):
    """build_py that, in a pure Python build, also records what is missing."""

    def run(self) -> None:
        super().run()
        if not self.distribution.ext_modules:
            for backend in ("cpu", "cuda"):
                facts.missing[backend] = f"FASTGPT_NO_EXT=1 was set; `{REBUILD}` without it builds the kernels"
            place_build_info(self.editable_mode, Path(self.build_lib))


class Wheel(bdist_wheel):
    """bdist_wheel whose tag follows from what was built: cp310-abi3, or py3-none-any without an extension."""

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command == "build" and not self.distribution.ext_modules:
            self.root_is_pure = True


facts = Facts()
if __name__ == "__main__":
    pure = wanted("FASTGPT_NO_EXT", "0") == "1"
    # fastgpt/kernels and fastgpt/bench are links to ./kernels and ./bench; a copy that lost its links needs a mapping
    folders = ("kernels", "bench", "bench/model")
    unlinked = {f"fastgpt.{n.replace('/', '.')}": n for n in folders if not (ROOT / "fastgpt" / n).is_dir()}
    setup(
        packages=[*find_packages(include=["fastgpt", "fastgpt.*"]), *unlinked],
        package_dir=unlinked and {"fastgpt": "fastgpt", **unlinked},
        package_data={
            "fastgpt": [
                "configs/*.yaml",
                "configs/*/*.yaml",
                "data/files/*",
                "evaluate/tasks/*",
                "evaluate/human/page/*",
                "report/page.css",
                "report/page.js",
                "serve/page.html",
                "serve/page.js",
                "py.typed",
            ]
        },
        include_package_data=False,
        # a placeholder until BuildNative has determined what can be built
        ext_modules=[] if pure else [Extension("fastgpt._C", CPU_SOURCES, py_limited_api=True)],
        cmdclass={"build_ext": BuildNative, "build_py": BuildPython, "bdist_wheel": Wheel},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
    if facts.built or facts.missing:
        print(facts.summary(), flush=True)
