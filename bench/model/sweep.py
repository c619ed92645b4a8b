"""Launch shapes of attention's Triton kernels by modelled time: `fastgpt bench model --sweep attention`.

The three kernels are recorded once in causal order, then compiled in every shape that may fit: tiles, warps and stages,
and once more with fewer registers where one more program would then fit a multiprocessor. A shape that spills, does not
compile or does not fit is dropped. Triton keeps what it compiled, so that a second sweep takes a third of the time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import math
import multiprocessing
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from fastgpt import ops
from fastgpt.bench.codegen import REGISTERS
from fastgpt.bench.model.chips import CHIPS, WARP
from fastgpt.bench.model.recording import META, Call, Recorder, as_if_on
from fastgpt.bench.model.step import DEVICES, Modeller, Row
from fastgpt.bench.model.traffic import work_of
from fastgpt.bench.model.triton_launches import TritonLaunch
from fastgpt.core import backend

OPS = ("attention",)
SHAPES = {64: (64, 1024, 12, 64), 128: (8, 2048, 16, 128)}  # head dimension -> B, T, H, D
KERNELS = {"fwd": "attention_fwd_kernel", "dkdv": "attention_dkdv_kernel", "dq": "attention_dq_kernel"}
SPILLS = ("LDL", "STL")
MOST_VALUES = 192  # of accumulators and scores in registers of a thread; more than that always spills
SQUEEZE = 1.35  # ptxas finds this share of a shape's registers to be dispensable at best


class Shape(NamedTuple):
    """BLOCK_M queries, BLOCK_N keys, warps, stages, and a limit of registers of a thread (0: none)."""

    m: int
    n: int
    warps: int
    stages: int
    registers: int = 0


class Job(NamedTuple):
    """A kernel in one shape, for the chips of one compute capability."""

    chips: tuple[str, ...]
    head_dim: int
    kernel: str  # a key of KERNELS
    shape: Shape


def candidates(kernel: str, head_dim: int) -> Iterator[Shape]:
    """Yield the shapes of a kernel. A warp has 16 rows of a tile at least: queries, in dK/dV keys."""
    for m, n, warps, stages in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3)):
        rows, across = (n, m) if kernel == "dkdv" else (m, n)
        sums = {"fwd": rows * head_dim, "dq": rows * head_dim, "dkdv": 2 * rows * head_dim}[kernel]
        scores = (1 if kernel == "fwd" else 2) * rows * across
        if rows >= 16 * warps / (2 if kernel == "dkdv" else 1) and (sums + scores) / (WARP * warps) <= MOST_VALUES:
            yield Shape(m, n, warps, stages)


@functools.cache
def recorded(chip: str, head_dim: int) -> dict[str, tuple[Call, TritonLaunch]]:
    """Return the launches of forward and backward on a chip, in the shapes that are in use."""
    recorder = Recorder(None)
    b, t, h, d = SHAPES[head_dim]
    with as_if_on(DEVICES[chip], recorder), backend.use(strict=True, attention="triton"), recorder:
        q, k, v = (torch.empty(b, t, h, d, dtype=torch.bfloat16, device=META, requires_grad=True) for _ in "qkv")
        out: Any = ops.attention(q, k, v, causal=True)
        out.backward(torch.empty_like(out))
    launches = ((call, launch) for call in recorder.calls for launch in call.launches)
    found = {launch.name: (call, launch) for call, launch in launches if isinstance(launch, TritonLaunch)}
    return {which: found[name] for which, name in KERNELS.items()}


def in_use(launch: TritonLaunch) -> Shape:
    """Return the shape of a launch."""
    m, n, o = launch.numbers["BLOCK_M"], launch.numbers["BLOCK_N"], launch.options
    return Shape(m, n, o["num_warps"], o["num_stages"], o.get("maxnreg") or 0)


def reshaped(kernel: str, launch: TritonLaunch, shape: Shape) -> TritonLaunch:
    """Return the launch in another shape."""
    length = launch.numbers["S" if kernel == "dkdv" else "T"]
    old, new = (s.n if kernel == "dkdv" else s.m for s in (in_use(launch), shape))
    heads = launch.grid[0] // math.ceil(length / old)
    options = {"num_warps": shape.warps, "num_stages": shape.stages}
    options |= {"maxnreg": shape.registers} if shape.registers else {}
    arguments = launch.arguments | {"BLOCK_M": shape.m, "BLOCK_N": shape.n}
    grid = math.ceil(length / new) * heads, 1, 1
    return dataclasses.replace(launch, grid=grid, arguments=arguments, options=options)


@functools.cache
def _modeller(chip: str) -> Modeller:
    return Modeller(CHIPS[chip], host=False)


def modelled(job: Job) -> list[Row]:
    """Return a row for each chip of a job: its time, or why it is dropped."""
    rows = []
    for chip in job.chips:
        call, launch = recorded(chip, job.head_dim)[job.kernel]
        about: Row = {"figure": "tile", "chip": chip, "kernel": job.kernel, "head_dim": job.head_dim}
        about |= {"tile": list(job.shape), "in_use": job.shape == in_use(launch)}
        rows.append(about | _figures(_modeller(chip), call, reshaped(job.kernel, launch, job.shape)))
    return rows


def _figures(modeller: Modeller, call: Call, launch: TritonLaunch) -> Row:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Triton prints all of the assembly that ptxas refuses
            code, shared = modeller.instances.triton(launch)
    except Exception as e:  # whatever Triton's compiler raises, the other shapes are still modelled
        return {"red": f"does not compile ({type(e).__name__})"}
    row = {"registers_of_thread": code.registers, "shared_bytes": shared}
    spills = sum(i.base in SPILLS for i in code.instructions)
    if spills:
        return row | {"red": f"{spills} instructions that spill"}
    found = modeller.of_kernel(call, launch, work_of(call, launch))
    del found["kernel"]  # by its short name
    return row | ({"red": "does not fit"} if found["limit"] == "bytes alone" else found)


def squeezed(row: Row) -> Shape | None:
    """Return a shape with so few registers that one more program fits, if ptxas may manage that."""
    shape = Shape(*row["tile"])
    programs = REGISTERS // (math.ceil(row["registers_of_thread"] / 8) * 8 * shape.warps * WARP)
    limit = REGISTERS // ((programs + 1) * shape.warps * WARP) // 8 * 8
    fits = not shape.registers and row["registers_of_thread"] <= SQUEEZE * limit
    return shape._replace(registers=limit) if fits else None


def sweep(chips: list[str]) -> list[Row]:
    """Return the rows of all shapes on these chips, the fastest of each kernel first; what is dropped comes last."""
    jobs = []
    for capability in sorted({CHIPS[chip].capability for chip in chips}):
        alike = tuple(chip for chip in chips if CHIPS[chip].capability == capability)
        for head_dim, kernel in itertools.product(SHAPES, KERNELS):
            used = [in_use(recorded(chip, head_dim)[kernel][1]) for chip in alike[:1]]
            shapes = dict.fromkeys([*used, *candidates(kernel, head_dim)])
            jobs += [Job(alike, head_dim, kernel, shape) for shape in shapes]
    rows: list[Row] = []
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        while jobs:
            found = list(zip(jobs, pool.map(modelled, jobs, chunksize=1), strict=True))
            rows += [row for _, each in found for row in each]
            again = [(job, squeezed(each[0])) for job, each in found if "red" not in each[0]]
            known = {(job.chips, job.head_dim, job.kernel, job.shape) for job in jobs}
            jobs = [job._replace(shape=s) for job, s in again if s and (*job[:3], s) not in known]
    return sorted(rows, key=lambda r: (r["chip"], r["head_dim"], r["kernel"], r.get("us", math.inf)))
