"""One op's benchmark: which providers there are, the gate before them, the figures, the table, the command line.

`python -m fastgpt.bench.OP --dtype bf16 --shape 8192x768 [--device cuda] [--phase forward] [--compile] [--json FILE]`
compares every backend of ours that runs here with PyTorch and with a copy of as many bytes, interleaved; rows go to
FILE as JSON Lines. A backend that fails its parity check prints no speed and makes the exit code 1. The same jobs are
pytest-benchmark functions: `pytest bench --benchmark-only`.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt import backend, parity
from fastgpt.bench._harness import (
    DTYPES,
    Job,
    Samples,
    Setting,
    append_rows,
    copy_job,
    count_sets,
    gpu_state,
    provenance,
    time_cpu,
    time_gpu,
    where,
)
from fastgpt.device import default_device

COPY = "copy"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Provider:
    """One way to do an op. With a `backend` it is ours, so that it is gated; without one it is a baseline."""

    name: str
    fn: Callable[..., Any]
    backend: str | None = None
    phases: tuple[str, ...] = ("forward", "backward", "both", "step")
    inplace: bool = False


@dataclass(frozen=True)
class Bench:
    """One op's benchmark.

    job(provider, setting, phase, seed) -> Job over an input set of its own. bytes_moved(shape, dtype, phase): the least
    that the phase moves. gate_cases(shape): (shape, options) of parity cases like what is measured. shapes: the
    default by device. tiny: a shape whose maths is nothing, for the cost of a call on the host.
    """

    op: str
    phases: tuple[str, ...]
    job: Callable[[Provider, Setting, str, int], Job]
    bytes_moved: Callable[[Shape, torch.dtype, str], int]
    providers: Callable[[Setting, bool], list[Provider]]
    gate_cases: Callable[[Shape], list[tuple[Shape, dict[str, Any]]]]
    shapes: dict[str, Shape]
    tiny: Shape


def ours(op: str, device: torch.device, fn: Callable[..., Any], **options: Any) -> list[Provider]:
    """One provider per kernel backend of `op` that runs on this device (never Triton in its interpreter)."""
    names = [b for b in backend.ops()[op] if backend.DEVICE_OF.get(b) == device.type and backend.missing(b) is None]
    suffix = " in place" if options.get("inplace") else ""
    return [Provider(name + suffix, fn, name, **options) for name in names]


def compiled(fn: Callable[..., Any]) -> Provider:
    """torch.compile of the eager baseline; its backward keeps its buffers, since it is timed again and again."""
    import torch._functorch.config as functorch

    functorch.donated_buffer = False
    return Provider("torch.compile", torch.compile(fn, dynamic=False))


def chosen(op: str, provider: Provider) -> AbstractContextManager[Any]:
    """What makes the public function go to this provider's backend, strictly."""
    return nullcontext() if provider.backend is None else backend.use(strict=True, **{op: provider.backend})


def autograd_job(call: Callable[[], Any], leaves: list[Tensor], grads: list[Tensor], phase: str) -> Job:
    """forward: `call` with autograd recording; backward: gradients of its outputs; both: one after the other."""

    def backward(out: Any, **keep: bool) -> tuple[Tensor, ...]:
        outputs = out if isinstance(out, tuple) else (out,)
        return torch.autograd.grad(outputs, leaves, grads[: len(outputs)], **keep)

    if phase == "forward":
        return Job(call)
    if phase == "both":
        return Job(lambda: backward(call()))
    out = call()
    return Job(lambda: backward(out, retain_graph=True))


PLAIN = "contiguous/contiguous"


def gate(bench: Bench, provider: Provider, setting: Setting) -> str | None:
    """Why this provider's figures must not be shown: parity at this dtype and row length; None if it holds."""
    every = [c for c in parity.cases(bench.op) if c.dtype == setting.dtype and c.layouts == PLAIN]
    picked = every[:: max(1, len(every) // 6)]
    for shape, options in bench.gate_cases(setting.shape):
        picked.append(parity.Case(bench.op, setting.dtype, "contiguous", shape, tuple(options.items())))
    try:
        rows = [r for c in picked for r in parity.check(c, provider.backend or "torch", setting.device.type)]
    except Exception as e:  # whatever stops a kernel from giving its result is a reason not to time it
        return f"{type(e).__name__}: {e}"
    bad = [r for r in rows if not r.ratio <= 1]
    return f"{bad[0].case} {bad[0].output}: error {bad[0].error:.2e}, allowed {bad[0].allowed:.2e}" if bad else None


def host_us(bench: Bench, provider: Provider, setting: Setting, phase: str) -> float:
    """Microseconds of the host per call, without waiting for a GPU: at the tiny shape, where the maths is nothing."""
    job = bench.job(provider, Setting(bench.tiny, setting.dtype, setting.device), phase, 1)
    best = math.inf
    with chosen(bench.op, provider):
        for _ in range(8):
            if setting.device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(25):
                job.run()
            best = min(best, (time.perf_counter() - start) / 25)
    return best * 1e6


def peak_mb(bench: Bench, provider: Provider, setting: Setting, phase: str) -> float | None:
    """Memory of the device that one call takes beside its inputs, outputs included; None on a CPU: not measured."""
    if setting.device.type != "cuda":
        return None
    job = bench.job(provider, setting, phase, 1)
    with chosen(bench.op, provider):
        job.run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        job.run()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def measure(
    bench: Bench, setting: Setting, phases: list[str], providers: list[Provider], seconds: float
) -> list[dict[str, Any]]:
    """One row per phase and provider: time, bytes, memory, host cost, provenance; or why there is none ("red")."""
    red = {p.name: why for p in providers if p.backend and (why := gate(bench, p, setting))}
    return [row for phase in phases for row in _measure_phase(bench, setting, phase, providers, seconds, red)]


def _measure_phase(
    bench: Bench, setting: Setting, phase: str, providers: list[Provider], seconds: float, red: dict[str, str]
) -> list[dict[str, Any]]:
    here = {p.name: p for p in providers if phase in p.phases}
    moved = bench.bytes_moved(setting.shape, setting.dtype, phase)
    sets = range(1, 1 + count_sets(moved, setting.device))
    make: dict[str, Callable[[], list[Job]]] = {
        p.name: functools.partial(_jobs, bench, p, setting, phase, sets) for p in here.values() if p.name not in red
    }
    make[COPY] = lambda: [copy_job(moved, setting, seed) for seed in sets]
    timer = time_gpu if setting.device.type == "cuda" else time_cpu
    samples, errors = timer(make, lambda n: nullcontext() if n == COPY else chosen(bench.op, here[n]), seconds)
    about = {"bench": bench.op, "phase": phase, "dtype": str(setting.dtype).split(".")[1], "shape": setting.shape}
    about |= {"sets": len(sets), "gpu": gpu_state(setting.device), "machine": provenance(setting.device)}
    floor = samples[COPY].quantile(0.5)
    rows = []
    for p in here.values():
        row = {**about, "provider": p.name, "backend": p.backend}
        if why := red.get(p.name) or errors.get(p.name):
            rows.append({**row, "red": why})
            continue
        costs = {"host_us": host_us(bench, p, setting, phase), "peak_mb": peak_mb(bench, p, setting, phase)}
        rows.append({**row, **_figures(samples[p.name], moved, floor), **costs})
    return [*rows, {**about, "provider": COPY, **_figures(samples[COPY], moved, floor)}]


def _jobs(bench: Bench, provider: Provider, setting: Setting, phase: str, sets: range) -> list[Job]:
    return [bench.job(provider, setting, phase, seed) for seed in sets]


def _figures(samples: Samples, moved: int, floor: float) -> dict[str, Any]:
    low, middle, high = (samples.quantile(q) for q in (0.2, 0.5, 0.8))
    times = {"ms": middle * 1e3, "ms_q20": low * 1e3, "ms_q80": high * 1e3, "samples": len(samples.seconds)}
    return {**times, "bytes": moved, "gb_s": moved / middle / 1e9, "pct_of_copy": 100 * floor / middle}


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a table; a red provider has its reason where its figures would be."""
    lines = [f"{'phase':<9}{'provider':<16}{'ms (20 .. 80 %)':<32}{'GB/s':>8}{'% copy':>8}{'peak MB':>9}{'host us':>9}"]
    for r in rows:
        start = f"{r['phase']:<9}{r['provider']:<16}"
        if "red" in r:
            lines.append(f"{start}RED, no speed is shown: {r['red']}")
            continue
        times = f"{r['ms']:.4f} ({r['ms_q20']:.4f} .. {r['ms_q80']:.4f})"
        memory, host = (_cell(r.get(key)) for key in ("peak_mb", "host_us"))
        lines.append(f"{start}{times:<32}{r['gb_s']:>8.1f}{r['pct_of_copy']:>8.1f}{memory:>9}{host:>9}")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def main(bench: Bench, argv: list[str] | None = None) -> int:
    """`python -m fastgpt.bench.OP`; 1 if a provider was red."""
    parser = argparse.ArgumentParser(prog=f"python -m fastgpt.bench.{bench.op}", description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--shape", action="append", metavar="AxB", type=_shape, help="may be repeated")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--phase", action="append", choices=bench.phases, help="may be repeated; default: all")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the baseline, too")
    parser.add_argument("--seconds", type=float, default=2.0, help="of samples per phase")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows to this file")
    args = parser.parse_args(argv)
    device = default_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    status = 0
    for shape in args.shape or [bench.shapes[device.type]]:
        setting = Setting(shape, dtype, device)
        providers = bench.providers(setting, args.compile)
        rows = measure(bench, setting, args.phase or list(bench.phases), providers, args.seconds)
        print(f"{bench.op} {'x'.join(map(str, shape))} {dtype} on {where(rows[0]['machine'])}")
        print(show(rows))
        for b in backend.ops()[bench.op]:
            if backend.DEVICE_OF.get(b) == device.type and (why := backend.missing(b)):
                print(f"not measured: {b}: {why}")
        if args.json:
            append_rows(args.json, rows)
        status |= any("red" in r for r in rows)
    return status


def _shape(text: str) -> Shape:
    parts = text.split("x")
    if len(parts) != 2 or not all(p.isdigit() and int(p) for p in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape, expected two numbers such as 8192x768")
    return tuple(map(int, parts))


def pytest_generate_tests(metafunc: Any) -> None:
    """For `pytest bench`: providers and phases of the module's BENCH; "host" is the tiny shape, the cost of a call."""
    device = torch.device("cpu")
    bench = metafunc.module.BENCH
    setting = Setting(bench.shapes["cpu"], torch.float32, device)
    cases = [(p, phase) for p in bench.providers(setting, False) for phase in bench.phases if phase in p.phases]
    metafunc.parametrize("shape", [bench.shapes["cpu"], bench.tiny], ids=["full", "host"])
    metafunc.parametrize("provider,phase", cases, ids=[f"{p.name}-{phase}".replace(" ", "_") for p, phase in cases])


def run_benchmark(benchmark: Any, bench: Bench, provider: Provider, phase: str, shape: Shape) -> None:
    """One pytest-benchmark figure, after the gate."""
    setting = Setting(shape, torch.float32, torch.device("cpu"))
    why = gate(bench, provider, setting) if provider.backend else None
    assert why is None, why
    with chosen(bench.op, provider):
        job = bench.job(provider, setting, phase, 1)
        reset = job.reset
        if reset is None:
            benchmark(job.run)
        else:
            benchmark.pedantic(job.run, setup=functools.partial(_quietly, reset), rounds=50)


def _quietly(reset: Callable[[], Any]) -> None:
    reset()  # pytest-benchmark would take what it returns for arguments
