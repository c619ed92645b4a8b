"""Compiler output of every kernel, without a GPU: `python -m fastgpt.bench.codegen [--only attention] [--all]`.

One row per kernel, configuration and architecture: registers per thread, stack (and, for CUDA, spills) and static or
launched shared memory in bytes, tensor-core instructions in the machine code (hmma: of a warp, wgmma: of a warp
group), and the bound on occupancy: the blocks per multiprocessor that registers, shared memory and threads allow,
what limits them, and the share of the multiprocessor's warps that they fill. CUDA: every kernel by nvcc for sm_80 and
sm_90a (fastgpt.checks.cuda). Shared memory that is sized at the launch counts where it is a single number (DYNAMIC);
otherwise (dynamic_shared) the bound ignores it and is an upper one. Triton: three configurations of each kernel for
sm_80 and sm_90, in bf16; --all compiles every one. Exit code 1: a compilation failed.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastgpt.bench._harness import append_rows, provenance, where
from fastgpt.checks import cuda as cuda_check
from fastgpt.checks.cuda import ToolMissing
from fastgpt.core.command import Parser, run_command

SOURCE = Path(__file__).resolve().parent.parent / "csrc"
LANGUAGES = ("cuda", "triton")
REGISTERS, REGISTER_UNIT, PARTITIONS = 65536, 256, 4  # per multiprocessor; unit of a warp's share; quarters
SHARED_UNIT, SHARED_RESERVED = 128, 1024  # bytes; the system reserves the second number in every block
# by compute capability: warps, blocks and KB of shared memory per multiprocessor (CUDA programming guide, appendix)
CHIPS = {80: (64, 32, 164), 86: (48, 16, 100), 89: (48, 24, 100), 90: (64, 32, 228)}
# Bytes that these kernels are launched with, whatever the shape
DYNAMIC = {
    "attention_fwd_kernel<*, 64, false>": 32768,
    "attention_fwd_kernel<*, 96, false>": 49152,
    "attention_fwd_kernel<*, 128, false>": 57344,
    "attention_fwd_kernel<*, 256, *>": 65536,
    "attention_fwd_kernel<*, 64, true>": 24576,
    "attention_fwd_kernel<*, 128, true>": 49152,
    "attention_fwd_sm90_kernel<*, 64>": 83016,
    "attention_fwd_sm90_kernel<*, 128>": 164936,
    "attention_dkdv_kernel<*, 64, *>": 49152,
    "attention_dkdv_kernel<*, 96, false>": 73728,
    "attention_dkdv_kernel<*, 128, *>": 65536,
    "attention_dkdv_kernel<*, 256, *>": 98304,
    "attention_dkdv_sm90_kernel<*, 64>": 135224,
    "attention_dkdv_sm90_kernel<*, 128>": 166456,
    "attention_dq_kernel<*, 64, *>": 57344,
    "attention_dq_kernel<*, 96, false>": 73728,
    "attention_dq_kernel<*, 128, false>": 81920,
    "attention_dq_kernel<*, 128, true>": 65536,
    "attention_dq_kernel<*, 256, *>": 98304,
    "attention_dq_sm90_kernel<*, 64>": 132200,
    "attention_dq_sm90_kernel<*, 128>": 197704,
}
PER_KERNEL = 3  # Triton configurations without --all
MACHINE = torch.device("cpu")  # the compilers run on the CPU, whatever device is present


def occupancy(chip: int, threads: int, registers: int, shared: int) -> dict[str, Any]:
    """Return blocks_per_sm, what limits them, and the percentage of the multiprocessor's warps that they fill."""
    warps, blocks, kilobytes = CHIPS[chip]
    needed = math.ceil(threads / 32)
    of_warp = math.ceil(max(1, registers) * 32 / REGISTER_UNIT) * REGISTER_UNIT
    of_block = math.ceil((shared + SHARED_RESERVED) / SHARED_UNIT) * SHARED_UNIT
    bounds = {
        "blocks": blocks,
        "threads": warps // needed,
        "registers": REGISTERS // PARTITIONS // of_warp * PARTITIONS // needed,
        "shared memory": kilobytes * 1024 // of_block,
    }
    limit = min(bounds, key=lambda name: bounds[name])
    most = bounds[limit]
    return {"blocks_per_sm": most, "limited_by": limit, "occupancy_pct": 100 * most * needed / warps}


def dynamic_kernels(source: Path) -> set[str]:
    """Return the names of the kernels that declare shared memory whose size is set at the launch."""
    found = set()
    for file in source.glob("*/*.cu"):
        for body in re.split(r"\b__global__\b", file.read_text(encoding="utf-8"))[1:]:
            name = re.search(r"(\w+_kernel)\s*\(", body)
            if name is not None and "FASTGPT_DYNAMIC_SHARED(" in body:
                found.add(name[1])
    return found


def launched_shared(kernel: str) -> int | None:
    """Return the bytes of shared memory that a launch of this kernel requests; None where that is not one number."""
    return next((n for pattern, n in DYNAMIC.items() if fnmatch.fnmatchcase(kernel, pattern)), None)


def cuda_rows(source: Path, only: str) -> list[dict[str, Any]]:
    """Return a row per CUDA kernel and architecture; raise ToolMissing without the tools."""
    kernels, failures = cuda_check.check(source, sorted(cuda_check.ARCHS), only)
    nvcc = cuda_check.find_nvcc()
    assert nvcc is not None, "check ran it"
    about = {"bench": "codegen", "language": "cuda", "compiler": nvcc_version(nvcc), "machine": provenance(MACHINE)}
    dynamic = dynamic_kernels(source)
    rows = []
    for k in kernels:
        row = {**about, "kernel": k.name, "arch": k.arch, "registers": k.registers, "stack_bytes": k.stack}
        row |= {"spill_bytes": k.spills, "shared_bytes": k.shared, "threads": k.threads}
        known = launched_shared(k.name)
        row |= {"dynamic_shared": known is None and k.name.split("<")[0] in dynamic}
        row |= {"hmma": k.tensor_products, "wgmma": k.warpgroup_products}
        chip = int(re.sub(r"\D", "", k.arch))
        rows.append(row | occupancy(chip, k.threads, k.registers, k.shared + (known or 0)))
    return rows + [{**about, "kernel": failure.split(" for ")[0], "red": failure} for failure in failures]


def nvcc_version(nvcc: Path) -> str:
    """Return the version of nvcc, as in 'nvcc 13.0.88'."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"\bV([\d.]+)", text)
    return f"nvcc {found[1] if found else 'of an unknown version'}"


def triton_rows(only: str, every: bool) -> list[dict[str, Any]]:
    """Return a row per Triton kernel, configuration and architecture; raise ToolMissing without the tools."""
    try:
        import triton

        from fastgpt.checks import triton as triton_check
    except ImportError as e:
        raise ToolMissing(f"triton cannot be imported: {e}") from e
    if triton.knobs.runtime.interpret:
        raise ToolMissing("TRITON_INTERPRET is set, so nothing would be compiled; unset it")
    wanted = [j for j in triton_check.jobs(None, False, quick=not every) if fnmatch.fnmatchcase(j.module, only)]
    wanted = wanted if every else some_of_each(wanted)
    about: dict[str, Any] = {"bench": "codegen", "language": "triton", "compiler": f"triton {triton.__version__}"}
    about |= {"machine": provenance(MACHINE)}
    rows: list[dict[str, Any]] = []
    for r in triton_check.check(wanted, _counted) if wanted else []:
        row: dict[str, Any] = {**about, "kernel": r.name, "arch": f"sm_{r.arch}"}
        if r.error:
            rows.append({**row, "red": r.error})
            continue
        row |= {"registers": r.registers, "stack_bytes": r.stack, "shared_bytes": r.shared, "threads": 32 * r.num_warps}
        row |= {"dynamic_shared": False, "hmma": r.hmma, "wgmma": r.wgmma}
        rows.append(row | occupancy(r.arch, 32 * r.num_warps, r.registers, r.shared))
    return rows


def some_of_each(jobs: list[Any]) -> list[Any]:
    """Return at most PER_KERNEL jobs of each kernel and architecture, spread evenly from the first to the last."""
    from fastgpt.checks import triton as triton_check

    kernels: dict[tuple[str, int], list[Any]] = {}
    for job in jobs:
        name = triton_check.configurations(job.module, job.dtype, job.weight_dtype)[job.number].name
        kernels.setdefault((name.split("[")[0], job.arch), []).append(job)
    steps = range(PER_KERNEL)
    picked = (sorted({i * (len(k) - 1) // (PER_KERNEL - 1) for i in steps}) for k in kernels.values())
    return [k[i] for k, numbers in zip(kernels.values(), picked) for i in numbers]


def _counted(job: Any) -> Any:
    """Return triton_check's report with hmma and wgmma counted in the machine code."""
    from fastgpt.checks import triton as triton_check

    report = triton_check.compile_one(job)
    if report.error:
        return report
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(triton_check.compiled(job).asm["cubin"])  # read from Triton's cache
        f.flush()
        done = subprocess.run([cuda_check.find_nvdisasm(), "-c", f.name], check=True, capture_output=True, text=True)
    (counts,) = cuda_check.instructions(done.stdout).values()
    return dataclasses.replace(report, hmma=counts["tensor_products"], wgmma=counts["warpgroup_products"])


def show(rows: list[dict[str, Any]]) -> str:
    """Return the rows of one language as a table, failures last."""
    good = sorted((r for r in rows if "red" not in r), key=lambda r: (r["kernel"], r["arch"]))
    width = max((len(r["kernel"]) for r in good), default=6)
    lines = [f"{'kernel':{width}}  arch    registers  stack  shared  threads  HMMA  wgmma  blocks/SM  occupancy, limit"]
    for r in good:
        blocks = f"{'<= ' if r['dynamic_shared'] else ''}{r['blocks_per_sm']}"
        numbers = f"{r['registers']:9}  {r['stack_bytes']:5}  {r['shared_bytes']:6}  {r['threads']:7}  {r['hmma']:4}"
        numbers += f"  {r['wgmma']:5}  {blocks:>9}  {r['occupancy_pct']:5.1f} %, {r['limited_by']}"
        lines.append(f"{r['kernel']:{width}}  {r['arch']:6}  {numbers}")
    return "\n".join(lines + [f"not compiled: {r['kernel']}: {r['red']}" for r in rows if "red" in r])


def main(argv: list[str] | None = None) -> int:
    """Return 1 if a compilation failed; a missing compiler is reported in one line and is not a failure."""
    parser = Parser(prog="python -m fastgpt.bench.codegen", description=__doc__)
    parser.add_argument("--language", choices=LANGUAGES, help="default: both")
    parser.add_argument("--only", default="*", metavar="OP", help="ops to compile, as in 'attention*'")
    parser.add_argument("--all", action="store_true", help="compile every configuration of the Triton kernels")
    parser.add_argument(
        "--source", type=Path, default=SOURCE, help="folder that contains the folders of the ops (default: csrc)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows to this file")
    args = parser.parse_args(argv)
    halves: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "cuda": lambda: cuda_rows(args.source, args.only),
        "triton": lambda: triton_rows(args.only, args.all),
    }
    print(f"code generation on {where(provenance(MACHINE))}")
    status = 0
    for language in [args.language] if args.language else LANGUAGES:
        try:
            rows = halves[language]()
        except ToolMissing as missing:
            print(f"{language} kernels: not compiled: {missing}", flush=True)
            continue
        print(f"{language} kernels: {len(rows)}\n{show(rows)}", flush=True)
        if args.json:
            append_rows(args.json, rows)
        status |= any("red" in r for r in rows)
    return status


if __name__ == "__main__":
    sys.exit(run_command(main))
