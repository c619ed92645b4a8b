"""Nsight Compute: the command that profiles one kernel of an op (`--ncu`), and the calls it captures (`--calls`)."""

from __future__ import annotations

import sys

import torch

from fastgpt.bench._harness import Setting
from fastgpt.bench._op import Bench, Provider, chosen
from fastgpt.core.device import DTYPES


def call(bench: Bench, setting: Setting, phases: list[str], found: list[Provider], calls: int) -> None:
    """Call each fastgpt provider `calls` times per phase, for a profiler to capture."""
    for phase in phases:
        for p in found:
            if p.backend and phase in p.phases:
                with chosen(bench.op, p):
                    job = bench.job(p, setting, phase, 1)
                    for _ in range(calls):
                        (job.reset or int)()
                        job.run()
                print(f"{bench.op} {phase} {p.name}: {calls} calls")
    if setting.device.type == "cuda":
        torch.cuda.synchronize()


def command(bench: Bench, setting: Setting, phase: str, backend: str | None) -> str:
    """Return the command that profiles one launch of the op's kernel (of `backend` if given) after two warm-up ones."""
    shape, dtype = "x".join(map(str, setting.shape)), next(n for n, d in DTYPES.items() if d == setting.dtype)
    kernels = {"linear_cross_entropy": "cross_entropy"}.get(bench.op)
    if bench.op in ("rope", "cross_entropy", "linear_divergence"):  # their kernels are not named after phases
        kernels = bench.op
    kernels = kernels or bench.op + {"forward": "_fwd", "backward": "_(bwd|dq|dkdv)"}.get(phase, "_")
    named = "" if backend is None else f"--backend {backend} "
    return (
        f"ncu --set full --kernel-name 'regex:^{kernels}' --launch-skip 2 --launch-count 1 "
        f"--export {bench.op}-{phase}-{shape}-{dtype} --force-overwrite {sys.executable} -m fastgpt.bench.{bench.op} "
        f"--device {setting.device} --dtype {dtype} --shape {shape} --phase {phase} {named}--calls 3"
    )
