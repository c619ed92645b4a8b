"""Ahead-of-time check of the Triton kernels: `python -m fastgpt.checks.triton [--arch 90] [--all | --quick]`.

It compiles every configuration that a launcher may pick (`configurations` of each kernel file) for explicit GPU
targets, and needs no GPU. cuobjdump, which Triton ships, reads registers, stack (spills) and shared memory from the
cubin. The exit code is 1 for a spill that ALLOWED_SPILLS does not list, for more shared memory than the chip has, for
more programs at a time than the registers of a multiprocessor allow, or for a failed compilation. Do not run it under
TRITON_INTERPRET=1, where nothing is compiled.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgpt import ops  # noqa: F401 (fills the registry)
from fastgpt.core import backend
from fastgpt.core.command import Parser, run_command
from fastgpt.core.errors import UserError
from fastgpt.kernels._runtime import COMPILE_OPTIONS, TRITON

# one kernel file for each op that has a Triton cell and does not only call kernels of another op
MODULES = [
    op for op, cells in backend.ops().items() if "triton" in cells and importlib.util.find_spec(f"fastgpt.kernels.{op}")
]
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227}
REGISTERS = 65536  # of one multiprocessor, on all chips above
_OCCUPANCY = "two to four registers, to reach ptxas's own occupancy target"
# name as in the report (regular expression) -> (allowed bytes of stack, reason)
ALLOWED_SPILLS: dict[str, tuple[int, str]] = {
    r"attention_fwd_kernel\[D=64 full\] (bfloat16|float16)( unaligned)?": (8, "128 registers: two programs at a time"),
    r"attention_(fwd|dkdv|dq)_kernel\[.*\] float32( unaligned)?": (128, "exact products run outside the tensor cores"),
    r"attention_decode_fwd_kernel\[D=.*\] float32( unaligned)?": (8, _OCCUPANCY),
    r"attention_decode_fwd_kernel\[D=(16|256) .*\] (bfloat16|float16) unaligned": (8, _OCCUPANCY),
    r"bias_gelu_fwd_kernel\[C=.* (erf|tanh) full\] .* unaligned": (8, _OCCUPANCY),
    r"cross_entropy_(bwd|fwd_bwd)_kernel\[K=4096 full\] float32( unaligned)?": (16, _OCCUPANCY),
    r"embedding_bwd_kernel\[C=256 add\] float32": (8, _OCCUPANCY),
    r"linear_divergence_rows_kernel\[K=.* jsd\] .* unaligned": (8, _OCCUPANCY),
    r"rope_fwd_kernel\[.* halves positions wide\] float32 unaligned": (8, _OCCUPANCY),
}
if TRITON == (3, 6):
    ALLOWED_SPILLS |= {
        r"cross_entropy_fwd_bwd_kernel\[K=128 full\] .* unaligned": (8, _OCCUPANCY),
        r"layer_norm_bwd_kernel\[C=8192 full\] bfloat16/float32 unaligned": (8, _OCCUPANCY),
    }
if TRITON >= (3, 9):
    ALLOWED_SPILLS |= {
        r"attention_decode_fwd_kernel\[D=(16 splits|128 splits softcap)\] (bfloat16|float16)": (8, _OCCUPANCY),
        r"layer_norm_bwd_kernel\[C=64 full\] bfloat16": (8, _OCCUPANCY),
    }


@dataclass(frozen=True)
class Job:
    """One configuration to compile: module, dtypes (PyTorch names), its number in `configurations`, target."""

    module: str
    dtype: str
    weight_dtype: str
    number: int
    arch: int
    aligned: bool


@dataclass(frozen=True)
class Report:
    """The compiler's results for one configuration."""

    name: str
    arch: int
    num_warps: int
    registers: int = 0
    stack: int = 0
    shared: int = 0
    programs: int | None = None
    error: str = ""
    hmma: int | None = None  # tensor-core instructions of a warp and of a warp group; None: not counted
    wgmma: int | None = None


def configurations(module: str, dtype: str, weight_dtype: str) -> list[Any]:
    """Return the configurations of one kernel file for one dtype."""
    kernels = importlib.import_module(f"fastgpt.kernels.{module}")
    return list(kernels.configurations(getattr(torch, dtype), getattr(torch, weight_dtype)))


def jobs(archs: list[int] | None, every: bool, quick: bool = False) -> list[Job]:
    """Return the configurations to compile.

    They are bf16 with bf16 parameters and 16-byte aligned pointers; with `every` also fp16, fp32, mixed dtypes and
    element-aligned pointers. Without `archs`, the targets are sm_80 and sm_90, or the first chip of a configuration
    that supports neither; with `every`, all chips. A configuration is compiled only for chips that may select it.
    `quick` keeps only configurations that are marked as quick. Of attention, which compiles longest, only these are
    compiled for element-aligned pointers.
    """
    pairs = [("bfloat16", "bfloat16")]
    if every:
        pairs += [("bfloat16", "float32"), ("float16", "float16"), ("float32", "float32")]
    found = []
    for module in MODULES:
        for dtype, weight_dtype in pairs:
            for i, c in enumerate(configurations(module, dtype, weight_dtype)):
                if quick and not c.quick:
                    continue
                wanted = archs or (sorted(SHARED_KB) if every else [80, 90])
                chips = [arch for arch in wanted if c.archs is None or arch in c.archs]
                if archs is None and not chips:
                    chips = [c.archs[0]]
                both = every and not c.aligned and (c.quick or module != "attention")
                alignments = (True, False) if both else (True,)
                found += [Job(module, dtype, weight_dtype, i, arch, a) for a in alignments for arch in chips]
    return found


def _source(configuration: Any, aligned: bool) -> ASTSource:
    kernel, arguments = configuration.kernel, configuration.arguments
    names = kernel.arg_names
    unknown = set(arguments) | set(configuration.constexprs)
    if unknown != set(names):
        raise ValueError(f"{configuration.name}: arguments differ from the kernel's: {sorted(unknown ^ set(names))}")
    typed = {n: t for n, t in arguments.items() if isinstance(t, str)}
    constexprs = {n: t for n, t in arguments.items() if not isinstance(t, str)} | configuration.constexprs
    signature = {n: typed.get(n, "constexpr") for n in names}
    fixed = set(kernel.do_not_specialize or ())
    divisible = [i for i, n in enumerate(names) if aligned and typed.get(n, "fp32") != "fp32" and n not in fixed]
    return ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): v for n, v in constexprs.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return the registers and the bytes of stack of the one kernel in a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        text = subprocess.run([tool, "-res-usage", f.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return int(found[1]), int(found[2])


def _configuration(job: Job) -> Any:
    return configurations(job.module, job.dtype, job.weight_dtype)[job.number]


def compiled(job: Job) -> Any:
    """Compile one configuration and return the kernel."""
    configuration = _configuration(job)
    chosen = {n: getattr(configuration, n) for n in ("num_warps", "num_stages", "maxnreg")}
    return triton.compile(
        _source(configuration, job.aligned),
        target=GPUTarget("cuda", job.arch, 32),
        options=COMPILE_OPTIONS | {n: value for n, value in chosen.items() if value is not None},
    )


def compile_one(job: Job) -> Report:
    """Compile one configuration. A failure becomes a report, so the others are still checked."""
    configuration = _configuration(job)
    types = job.dtype if job.dtype == job.weight_dtype else f"{job.dtype}/{job.weight_dtype}"
    name = f"{configuration.name} {types}{'' if job.aligned else ' unaligned'}"
    try:
        kernel = compiled(job)
        registers, stack = _resources(kernel.asm["cubin"])
    except Exception as e:
        return Report(name, job.arch, configuration.num_warps, error=f"{type(e).__name__}: {str(e)[-300:]}")
    programs = configuration.programs if job.aligned else None  # without alignment fewer may fit
    shared = kernel.metadata.shared
    return Report(name, job.arch, configuration.num_warps, registers, stack, shared, programs)


def problem(report: Report) -> str:
    """Return why this configuration must not ship, or "" if it may."""
    if report.error:
        return report.error
    if report.shared > SHARED_KB[report.arch] * 1024:
        return f"{report.shared} bytes of shared memory, sm_{report.arch} has {SHARED_KB[report.arch]} KB"
    fit = REGISTERS // max(1, math.ceil(report.registers / 8) * 8 * report.num_warps * 32)
    if fit < (report.programs or 1):
        wanted = f"{report.programs or 1} x {report.registers} registers x {report.num_warps} warps"
        return f"{wanted} do not fit a multiprocessor, {fit} programs do"
    allowed = max((b for pattern, (b, _) in ALLOWED_SPILLS.items() if re.fullmatch(pattern, report.name)), default=0)
    return f"{report.stack} bytes of stack, {allowed} allowed" if report.stack > allowed else ""


def check(found: list[Job], one: Callable[[Job], Report] = compile_one) -> list[Report]:
    """Compile the configurations with `one`, on all cores that this process may use; print refusals and progress to
    stderr.

    The cache is temporary, unless TRITON_CACHE_DIR names one: an interrupted check then resumes where it stopped.
    """
    reports = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            for report in pool.imap_unordered(one, found):
                reports.append(report)
                if problem(report):
                    print(f"{report.name} sm_{report.arch}: {problem(report)}", file=sys.stderr, flush=True)
                if len(reports) % 500 == 0:
                    print(f"{len(reports)} of {len(found)} compiled", file=sys.stderr, flush=True)
    return reports


def _print(reports: list[Report]) -> int:
    width = max(len(r.name) for r in reports)
    print(f"{'configuration':{width}}  sm  warps  registers  stack  shared")
    bad = 0
    for r in sorted(reports, key=lambda r: (r.name, r.arch)):
        why = problem(r)
        bad += bool(why)
        mark = f"  FAIL: {why}" if why else ""
        print(f"{r.name:{width}}  {r.arch}  {r.num_warps:5}  {r.registers:9}  {r.stack:5}  {r.shared:6}{mark}")
    print(f"{len(reports)} configurations, {bad} refused")
    return bad


def main(arguments: list[str] | None = None) -> int:
    """Run the check and return the exit code."""
    parser = Parser(prog="python -m fastgpt.checks.triton", description="compile every Triton kernel")
    parser.add_argument(
        "--arch",
        type=int,
        action="append",
        choices=sorted(SHARED_KB),
        help="default: 80, 90",
    )
    parser.add_argument("--all", action="store_true", help="every dtype, alignment and chip")
    parser.add_argument("--quick", action="store_true", help="no options and all options, some of the widths")
    parser.add_argument("--only", default="", help="configurations in whose name this regular expression is found")
    parser.add_argument("--json", type=Path, help="write the reports to this file")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        print("triton_check: TRITON_INTERPRET is set, nothing would be compiled; run it without", file=sys.stderr)
        return 2
    found = jobs(options.arch, options.all, options.quick)
    found = [job for job in found if re.search(options.only, _configuration(job).name)]
    if not found:
        raise UserError(f"triton_check: --only {options.only!r} is found in no configuration, expected part of a name")
    reports = check(found)
    if options.json:
        options.json.write_text(json.dumps([asdict(r) | {"problem": problem(r)} for r in reports], indent=1))
    return 1 if _print(reports) else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
