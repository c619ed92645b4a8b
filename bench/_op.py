"""One op's benchmark: its providers, the parity gate, the figures, the table, the command line.

`fastgpt bench OP --dtype bf16 --shape 8192x768 [--device cuda] [--phase forward] [--compile] [--json FILE]`
compares every fastgpt backend that runs here with PyTorch, with other installed libraries and with a copy of as many
bytes (for an op that multiplies: a matrix product of as many FLOP), interleaved; rows go to FILE as JSON Lines. A
backend that fails its parity check shows no speed and makes the exit code 1. The same jobs are pytest-benchmark
functions: `pytest bench --benchmark-only`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt import parity
from fastgpt.bench import OPS
from fastgpt.bench._harness import (
    Job,
    Samples,
    Setting,
    copy_job,
    count_sets,
    datasheet,
    gemm_job,
    gpu_state,
    provenance,
    time_cpu,
    time_gpu,
)
from fastgpt.core import backend
from fastgpt.models.config import ModelConfig

COPY, GEMM = "copy", "gemm"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Provider:
    """One way to run an op. With a `backend` it is fastgpt's and is gated by parity; without one it is a baseline, of
    another library if it has a `package`."""

    name: str
    fn: Callable[..., Any]
    backend: str | None = None
    phases: tuple[str, ...] = ("forward", "backward", "both", "step")
    in_step: bool = False
    package: str = ""


@dataclass(frozen=True)
class Bench:
    """One op's benchmark.

    dims: names of a shape's numbers, as in NxC. public: fastgpt's function, called by every provider with a backend;
    in_step: a suffix and the form that a training step calls, where that is another one. baseline: PyTorch's version;
    others(setting): further baselines. job(provider, setting, phase, seed) -> Job over its own input set.
    bytes_moved(shape, dtype, phase), flops(shape, phase): the least that the phase moves and multiplies.
    of_model(model, B, T): shape and options of the public function in a training step, None if the model does not use
    the op. gate_cases(shape): (shape, options) of parity cases like the measured one. shapes: the defaults by device.
    tiny: a shape with negligible maths, to measure the host's cost of a call. within: the op that calls this one in a
    training step, on the backend that serves itself.
    """

    op: str
    dims: str
    public: Callable[..., Any]
    baseline: Provider
    job: Callable[[Provider, Setting, str, int], Job]
    bytes_moved: Callable[[Shape, torch.dtype, str], int]
    of_model: Callable[[ModelConfig, int, int], tuple[Shape, dict[str, Any]] | None]
    shapes: dict[str, tuple[Shape, ...]]
    tiny: Shape
    gate_cases: Callable[[Shape], list[tuple[Shape, dict[str, Any]]]] = lambda shape: []
    flops: Callable[[Shape, str], float] | None = None
    phases: tuple[str, ...] = ("forward", "backward", "both")
    in_step: tuple[str, Callable[..., Any]] | None = None
    others: Callable[[Setting], list[Provider]] = lambda setting: []
    within: str = ""


def bench_of(op: str) -> Bench:
    """Return the benchmark of an op."""
    bench: Bench = importlib.import_module(f"fastgpt.bench.{op}").BENCH
    return bench


def every() -> list[Bench]:
    """Return the benchmarks of all ops."""
    return [bench_of(op) for op in OPS]


def providers(bench: Bench, setting: Setting, compile_modes: tuple[str, ...] = ()) -> list[Provider]:
    """Return each fastgpt backend that runs on this device (never Triton in its interpreter), then the baselines."""
    device = setting.device.type
    names = [b for b in backend.ops()[bench.op] if backend.DEVICE_OF.get(b) == device and backend.missing(b) is None]
    found = [Provider(name, bench.public, name) for name in names]
    if bench.in_step is not None:
        suffix, fn = bench.in_step
        found += [Provider(f"{name} {suffix}", fn, name, ("both",), in_step=True) for name in names]
    compiled = [_compiled(bench.baseline.fn, mode) for mode in compile_modes if "step" not in bench.phases]
    return [*found, bench.baseline, *compiled, *bench.others(setting)]


def _compiled(fn: Callable[..., Any], mode: str) -> Provider:
    """Return the eager baseline under torch.compile; backward keeps its buffers because it is timed repeatedly."""
    import torch._functorch.config as functorch

    functorch.donated_buffer = False
    name = "torch.compile" if mode == "default" else f"compile {mode.removesuffix('-no-cudagraphs')}"
    return Provider(name, torch.compile(fn, dynamic=False, mode=mode))


def installed(setting: Setting, **baselines: Callable[..., Any]) -> list[Provider]:
    """Return the baselines whose package is installed, on a GPU; each imports its package when called."""
    if setting.device.type != "cuda":
        return []
    return [Provider(name, fn, package=name) for name, fn in baselines.items() if importlib.util.find_spec(name)]


def chosen(op: str, provider: Provider) -> AbstractContextManager[Any]:
    """Return a context in which the public function uses this provider's backend, without falling back."""
    return nullcontext() if provider.backend is None else backend.use(strict=True, **{op: provider.backend})


def of_phase(phase: str, forward: float, backward: float) -> Any:
    """Return what a phase moves or multiplies: forward, backward, or both added."""
    return {"forward": forward, "backward": backward, "both": forward + backward}[phase]


def autograd_job(call: Callable[[], Any], leaves: list[Tensor], grads: list[Tensor], phase: str) -> Job:
    """Return a job. forward: `call` with autograd recording; backward: gradients of its outputs; both: both in turn."""

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
    """Return why this provider's figures must not be shown: parity at this dtype and row length; None if it passes."""
    if bench.op not in parity.SUBJECTS:
        return f"{bench.op} has no parity cases"
    every = [c for c in parity.cases(bench.op) if c.dtype == setting.dtype and c.layouts == PLAIN]
    variant = ":" in (provider.backend or "")  # it takes few options, so only the cases of this benchmark
    picked = [] if variant else every[:: max(1, len(every) // 6)]
    for shape, options in bench.gate_cases(setting.shape):
        picked.append(parity.Case(bench.op, setting.dtype, "contiguous", shape, tuple(options.items())))
    try:
        rows = [r for c in picked for r in parity.check(c, provider.backend or "torch", setting.device.type)]
    except Exception as e:  # whatever stops a kernel from returning a result is a reason not to time it
        return f"{type(e).__name__}: {e}"
    bad = [r for r in rows if not r.ratio <= 1]
    return f"{bad[0].case} {bad[0].output}: error {bad[0].error:.2e}, allowed {bad[0].allowed:.2e}" if bad else None


def host_us(bench: Bench, provider: Provider, setting: Setting, phase: str) -> float:
    """Return the host's microseconds per call, without waiting for a GPU, at the tiny shape with negligible maths."""
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
    """Return the device memory (MB) that one call needs in addition to its inputs, outputs included; None on a CPU."""
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
    """Return one row per phase and provider: time, bytes, memory, host cost, provenance; or the reason ("red")."""
    red = {p.name: why for p in providers if p.backend and (why := gate(bench, p, setting))}
    return [row for phase in phases for row in _measure_phase(bench, setting, phase, providers, seconds, red)]


def _measure_phase(
    bench: Bench, setting: Setting, phase: str, providers: list[Provider], seconds: float, red: dict[str, str]
) -> list[dict[str, Any]]:
    here = {p.name: p for p in providers if phase in p.phases}
    moved = bench.bytes_moved(setting.shape, setting.dtype, phase)
    flops = None if bench.flops is None else bench.flops(setting.shape, phase)
    sets = range(1, 1 + count_sets(moved, setting.device))
    make: dict[str, Callable[[], list[Job]]] = {
        p.name: functools.partial(jobs, bench, p, setting, phase, sets) for p in here.values() if p.name not in red
    }
    best, scale = COPY, 1.0
    if flops is None:
        make[COPY] = lambda: [copy_job(moved, setting, seed) for seed in sets]
    else:
        best, (product, scale) = GEMM, gemm_job(flops, setting, 1)
        make[GEMM] = lambda: [product]
    timer = time_gpu if setting.device.type == "cuda" else time_cpu
    samples, errors = timer(make, lambda n: nullcontext() if n == best else chosen(bench.op, here[n]), seconds)
    sheet = datasheet(setting, flops is not None)
    floor = samples[best] = Samples([scale * s for s in samples[best].seconds], samples[best].cut)
    about: dict[str, Any] = {
        "bench": bench.op,
        "phase": phase,
        "dtype": str(setting.dtype).split(".")[1],
        "shape": setting.shape,
    }
    about |= {"sets": len(sets), "gpu": gpu_state(setting.device), "machine": provenance(setting.device)}
    figures = functools.partial(_figures, moved=moved, flops=flops, best=best, floor=floor.quantile(0.5), sheet=sheet)
    reference = bench.baseline.name if bench.baseline.name in samples else best
    rows = []
    for p in here.values():
        row = {**about, "provider": p.name, "backend": p.backend}
        if why := red.get(p.name) or errors.get(p.name):
            rows.append({**row, "red": " ".join(why.split())[:300]})  # a library's error may have many lines
            continue
        costs: dict[str, Any] = {}
        try:
            costs["host_us"] = host_us(bench, p, setting, phase)
            costs["peak_mb"] = peak_mb(bench, p, setting, phase)
        except Exception as e:  # the times remain valid
            costs["costs_failed"] = f"{type(e).__name__}: {e}"[:300]
        if p.name != reference:
            costs |= samples[p.name].against(samples[reference], reference)
        rows.append({**row, **figures(samples[p.name]), **costs})
    return [*rows, {**about, "provider": best, **figures(floor)}]


def jobs(bench: Bench, provider: Provider, setting: Setting, phase: str, sets: range) -> list[Job]:
    """Return one job per input set."""
    return [bench.job(provider, setting, phase, seed) for seed in sets]


def _figures(
    samples: Samples,
    moved: int,
    floor: float,
    flops: float | None = None,
    best: str = COPY,
    sheet: float | None = None,
) -> dict[str, Any]:
    middle = samples.quantile(0.5)
    row: dict[str, Any] = {
        **samples.figures(),
        "bytes": moved,
        "gb_s": moved / middle / 1e9,
        f"pct_of_{best}": 100 * floor / middle,
    }
    row["pct_of_datasheet"] = None if sheet is None else 100 * (moved if flops is None else flops) / middle / sheet
    return row if flops is None else row | {"flops": flops, "tflop_s": flops / middle / 1e12}


def show(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table; a red provider shows its reason in place of figures."""
    multiplies = any("tflop_s" in r for r in rows)
    rate, unit, best = ("tflop_s", "TFLOP/s", GEMM) if multiplies else ("gb_s", "GB/s", COPY)
    head = f"{'phase':<9}{'provider':<22}{'ms (20 .. 80 %)':<32}{unit:>8}"
    lines = [f"{head}{'% ' + best:>8}{'% sheet':>9}{'peak MB':>9}{'host us':>9}"]
    for r in rows:
        start = f"{r['phase']:<9}{r['provider']:<22}"
        if "red" in r:
            lines.append(f"{start}{'RED, no speed is shown' if r['backend'] else 'not measured'}: {r['red']}")
            continue
        times = f"{r['ms']:.4f} ({r['ms_q20']:.4f} .. {r['ms_q80']:.4f})"
        rest = "".join(f"{_cell(r.get(key)):>9}" for key in ("pct_of_datasheet", "peak_mb", "host_us"))
        speed = f"{r[rate]:>8.3g}" if multiplies else f"{r[rate]:>8.1f}"
        failed = f"  {r['costs_failed']}" if "costs_failed" in r else ""
        lines.append(f"{start}{times:<32}{speed}{r['pct_of_' + best]:>8.1f}{rest}{failed}")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def pytest_generate_tests(metafunc: Any) -> None:
    """Parametrise `pytest bench` by providers and phases of BENCH; "host" is the tiny shape, for the cost of a call."""
    bench = metafunc.module.BENCH
    full = bench.shapes["cpu"][0]
    found = providers(bench, Setting(full, torch.float32, torch.device("cpu")))
    cases = [(p, phase) for p in found for phase in bench.phases if phase in p.phases]
    metafunc.parametrize("shape", [full, bench.tiny], ids=["full", "host"])
    metafunc.parametrize("provider,phase", cases, ids=[f"{p.name}-{phase}".replace(" ", "_") for p, phase in cases])


def run_benchmark(request: Any, benchmark: Any, provider: Provider, phase: str, shape: Shape) -> None:
    """Measure one figure of the module's BENCH after the gate, for `pytest bench --benchmark-only`."""
    bench = request.module.BENCH
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
    reset()  # without a return value: pytest-benchmark would use it as arguments
