"""Compile check of the CUDA kernels: `python -m fastgpt.checks.cuda [--source DIR] [--arch A] [--json F]`.

It needs no GPU. Every csrc/*/*.cu is compiled separately for sm_80 and sm_90a. ptxas reports registers, stack, spills
and shared memory of each kernel; nvdisasm, which Triton ships, shows whether loads are 128 bits wide. The exit code is
1 if a compilation fails, a kernel uses local memory, a memory-bound kernel has no 128-bit load or asynchronous copy, or
a kernel of matrix products does not run on tensor cores with 128-bit asynchronous copies. cuda_check.json next to the
kernel lists its exemptions, by the name as printed, with * and ?:

    {"spills": {"kernel": {"bytes": n, "reason": why}},  bytes of local memory that are allowed
     "scalar": {"kernel": why},                           it needs no 128-bit load or copy
     "tensor_cores": ["kernel"],                          it computes matrix products
     "warpgroups": ["kernel"]}                            it does so with the instructions of sm_90a, and only there

The exit code is 2 if a tool is missing.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastgpt.core.command import Parser, run_command

ARCHS = {"sm_80": "compute_80", "sm_90a": "compute_90a"}
FLAGS = ("-std=c++17", "-O3", "-Xptxas", "-v", "-cubin")
REMEDY = (
    "cuda_check: no nvcc found; set CUDA_HOME to a CUDA toolkit, or pip install -r requirements-dev.txt, "
    "which names the packages nvidia-cuda-nvcc, nvidia-nvvm, nvidia-cuda-crt and nvidia-cuda-runtime"
)


class ToolMissing(Exception):
    """A tool that this check runs is missing; the message says how to install it."""


@dataclass(frozen=True)
class Kernel:
    """The compiler's results for one kernel and one architecture."""

    name: str
    arch: str
    registers: int
    stack: int  # bytes of local memory for each thread
    spills: int  # bytes stored and loaded
    shared: int
    wide_loads: int  # LDG.E.128 instructions
    wide_copies: int = 0  # LDGSTS.E.128: global to shared memory
    tensor_products: int = 0  # HMMA
    warpgroup_products: int = 0  # HGMMA
    tensor_copies: int = 0  # UTMALDG: global to shared memory by TMA
    threads: int = 0  # of a block, at most
    problem: str = ""


def _toolkit_of(nvcc: Path) -> Path:
    """Return the real nvcc if this one is a wrapper; a dry run prints its folder."""
    text = subprocess.run([nvcc, "-v", "--dryrun", "x.cu"], capture_output=True, text=True)
    found = re.search(r"^#\$ _HERE_=(.+)$", text.stdout + text.stderr, re.M)
    real = Path(found[1].strip()) / "nvcc" if found else nvcc
    return real if real.exists() else nvcc


def find_nvcc() -> Path | None:
    """Return nvcc from CUDA_HOME, PATH or NVIDIA's PyPI packages (nvidia/cu13/bin in site-packages), in this order."""
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return Path(home) / "bin" / "nvcc"
    on_path = shutil.which("nvcc")
    if on_path:
        return _toolkit_of(Path(on_path))
    candidates = [found for entry in sys.path for found in sorted(Path(entry or ".").glob("nvidia/*/bin/nvcc"))]
    return candidates[-1] if candidates else None


def find_nvdisasm() -> Path:
    spec = importlib.util.find_spec("triton")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for path in (Path(f) / "backends" / "nvidia" / "bin" / "nvdisasm" for f in folders):
        if path.exists():
            return path
    on_path = shutil.which("nvdisasm")
    if on_path is None:
        raise ToolMissing("cuda_check: no nvdisasm found; pip install triton, which brings it")
    return Path(on_path)


def short_names(mangled: list[str]) -> dict[str, str]:
    """Map mangled names to kernel<types>, without namespaces and arguments."""
    if shutil.which("c++filt") is None or not mangled:
        return {m: m for m in mangled}
    lines = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    names = {}
    for m, line in zip(mangled, lines.splitlines(), strict=True):
        plain = re.sub(r"\(anonymous namespace\)::|fastgpt::|cuda::|^void ", "", line)
        plain = re.sub(r"\([A-Za-z:]+\)(\d)", r"\1", plain)  # (Master)1 -> 1
        names[m] = re.sub(r"\((?![^<]*>).*$", "", plain)
    return names


def parse_ptxas(text: str) -> dict[str, dict[str, int]]:
    """Parse the output of ptxas -v: mangled name -> registers, stack, spills, shared."""
    found: dict[str, dict[str, int]] = {}
    for block in text.split("Compiling entry function '")[1:]:
        numbers = {"stack": 0, "spills": 0, "shared": 0}
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
        used = re.search(r"Used (\d+) registers", block)
        shared = re.search(r"(\d+) bytes smem", block)
        if frame is None or used is None:
            raise ValueError(f"ptxas -v printed no resources for {block[:80]!r}")
        numbers |= {"stack": int(frame[1]), "spills": int(frame[2]) + int(frame[3]), "registers": int(used[1])}
        found[block.split("'")[0]] = numbers | {"shared": int(shared[1]) if shared else 0}
    return found


COUNTED = {
    "wide_loads": re.compile(r"\bLDG\.E\.(?:\w+\.)*128\b"),
    "wide_copies": re.compile(r"\bLDGSTS\.E\.(?:\w+\.)*128\b"),
    "tensor_products": re.compile(r"\bHMMA\.16816\b"),
    "warpgroup_products": re.compile(r"\bHGMMA\."),
    "tensor_copies": re.compile(r"\bUTMALDG\."),
}
# Warnings, and what ptxas says where products of warpgroups will not overlap or setmaxnreg has no effect
LOSSES = re.compile(r"\bwarning\b|Potential Performance Loss")


def instructions(disassembly: str) -> dict[str, dict[str, int]]:
    """Parse the output of nvdisasm: mangled name -> number of instructions of each kind in COUNTED."""
    sections = re.split(r"^\s*\.section\s+\.text\.", disassembly, flags=re.M)[1:]
    return {s.split(",")[0].strip(): {kind: len(p.findall(s)) for kind, p in COUNTED.items()} for s in sections}


def most_threads(disassembly: str) -> dict[str, int]:
    """Parse the output of nvdisasm: mangled name -> most threads of a block (__launch_bounds__, or Triton's warps)."""
    found = {}
    for section in re.split(r"^\s*\.section\s+\.nv\.info\.", disassembly, flags=re.M)[1:]:
        bound = re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\n(?:.*\n){,5}?.*\.word\s+0x(\w+)", section)
        if bound is not None:
            found[section.split(",")[0].strip()] = int(bound[1], 16)
    return found


def excuses(source: Path) -> dict[str, dict[str, Any]]:
    """Return the merged exemptions of all cuda_check.json below `source`: by kind of exemption."""
    found: dict[str, dict[str, Any]] = {"spills": {}, "scalar": {}, "tensor_cores": {}, "warpgroups": {}}
    for path in sorted(source.glob("*/cuda_check.json")):
        for kind, kernels in json.loads(path.read_text(encoding="utf-8")).items():
            found[kind] |= kernels if isinstance(kernels, dict) else dict.fromkeys(kernels)
    return found


def problem(kernel: Kernel, excused: dict[str, dict[str, Any]]) -> str:
    """Return why this kernel must not ship, or "" if it may. excused: as returned by `excuses`."""

    def named(kind: str) -> list[Any]:
        return [said for pattern, said in excused[kind].items() if fnmatch.fnmatchcase(kernel.name, pattern)]

    local, limit = max(kernel.stack, kernel.spills), max((int(a["bytes"]) for a in named("spills")), default=0)
    if local > limit:
        return f"{kernel.stack} bytes of stack, {kernel.spills} of spills; cuda_check.json allows {limit}"
    if named("warpgroups"):
        if kernel.arch != "sm_90a":
            return ""  # a stub
        if kernel.warpgroup_products == 0:
            return "no product of a warpgroup (HGMMA)"
        return "" if kernel.tensor_copies else "no copy of a tensor to shared memory (UTMALDG)"
    if named("tensor_cores"):
        if kernel.tensor_products == 0:
            return "no product on tensor cores (HMMA.16816)"
        return "" if kernel.wide_copies else "no 128-bit copy to shared memory (LDGSTS.E.128)"
    wide = kernel.wide_loads or kernel.wide_copies
    return "" if wide or named("scalar") else "no 128-bit load or copy (LDG.E.128, LDGSTS.E.128)"


def compile_file(nvcc: Path, source: Path, arch: str, include: Path, cubin: Path) -> subprocess.CompletedProcess[str]:
    """Run nvcc on a file for one architecture of ARCHS. include: the folder of the ops' folders."""
    target = f"arch={ARCHS[arch]},code={arch}"
    command = [str(nvcc), *FLAGS, "-I", str(include), "-gencode", target, str(source), "-o", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True)


def compile_one(nvcc: Path, nvdisasm: Path, source: Path, arch: str, folder: Path) -> list[Kernel]:
    """Compile a file for one architecture and return its kernels; raise RuntimeError with the compiler output."""
    cubin = folder / f"{source.parent.name}-{source.stem}.{arch}.cubin"
    done = compile_file(nvcc, source, arch, source.parent.parent, cubin)
    if done.returncode != 0 or LOSSES.search(done.stderr):
        raise RuntimeError(f"{source.parent.name}/{source.name} for {arch}:\n{done.stdout}{done.stderr}")
    resources = parse_ptxas(done.stdout + done.stderr)
    listing = subprocess.run([str(nvdisasm), str(cubin)], capture_output=True, text=True)
    counts = instructions(listing.stdout)
    if set(resources) - set(counts):
        absent = sorted(set(resources) - set(counts))
        raise RuntimeError(f"nvdisasm lists no code for {absent}: {listing.stderr[-300:]}")
    names, threads = short_names(list(resources)), most_threads(listing.stdout)
    numbers = {m: resources[m] | counts[m] | {"threads": threads.get(m, 0)} for m in sorted(resources)}
    return [Kernel(name=names[m], arch=arch, problem="", **n) for m, n in numbers.items()]


def check(source: Path, archs: list[str], names: str = "*") -> tuple[list[Kernel], list[str]]:
    """Return every kernel of the ops `names` (folders of `source`) with its problem, and the failed compilations."""
    nvcc, nvdisasm = find_nvcc(), find_nvdisasm()
    if nvcc is None:
        raise ToolMissing(REMEDY)
    files = sorted(source.glob(f"{names}/*.cu"))
    if not files:
        raise ToolMissing(
            f"cuda_check: no {names}/*.cu in {source}; run it in a checkout, or give the folder by --source"
        )
    excused = excuses(source)
    kernels: list[Kernel] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(compile_one, nvcc, nvdisasm, f, arch, Path(folder)) for f in files for arch in archs]
        for job in jobs:
            try:
                kernels += [Kernel(**asdict(k) | {"problem": problem(k, excused)}) for k in job.result()]
            except RuntimeError as error:
                failures.append(str(error))
    return kernels, failures


def _print(kernels: list[Kernel], failures: list[str]) -> None:
    width = max((len(k.name) for k in kernels), default=6)
    print(f"{'kernel':{width}}  arch    registers  stack  spills  shared  LDG.128  LDGSTS.128  HMMA")
    for k in sorted(kernels, key=lambda k: (k.name, k.arch)):
        mark = f"  FAIL: {k.problem}" if k.problem else ""
        numbers = f"{k.registers:9}  {k.stack:5}  {k.spills:6}  {k.shared:6}  {k.wide_loads:7}"
        numbers += f"  {k.wide_copies:10}  {k.tensor_products:4}"
        print(f"{k.name:{width}}  {k.arch:6}  {numbers}{mark}")
    for failure in failures:
        print(f"FAIL: {failure}", file=sys.stderr)
    refused = sum(bool(k.problem) for k in kernels)
    print(f"{len(kernels)} kernels, {refused} refused, {len(failures)} compilations failed")


def main(arguments: list[str] | None = None) -> int:
    """Run the check and return the exit code."""
    parser = Parser(prog="python -m fastgpt.checks.cuda", description="compile every CUDA kernel")
    default = Path(__file__).resolve().parents[2] / "csrc"
    parser.add_argument("--source", type=Path, default=default, help="folder of the ops' folders (default: csrc)")
    parser.add_argument("--arch", action="append", choices=sorted(ARCHS), help="default: all")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    options = parser.parse_args(arguments)
    try:
        kernels, failures = check(options.source, options.arch or sorted(ARCHS))
    except ToolMissing as missing:
        print(missing, file=sys.stderr)
        return 2
    _print(kernels, failures)
    if options.json:
        options.json.write_text(json.dumps([asdict(k) for k in kernels], indent=1))
    return 1 if failures or any(k.problem for k in kernels) else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
