"""What every bench file shares: correctness gate, interleaved timers, bytes, provenance, rows and the table.

A figure is the median of interleaved samples with its 20 and 80 % quantiles. Every provider of a phase (our backends,
PyTorch, and a copy that moves as many bytes) takes its turn in every round, the order turning from round to round, so
that a drift of the machine meets all of them alike. Inputs are random and rotate among sets that together are larger
than the last cache. GPU: each provider's calls over all sets are one CUDA graph, timed by events, long enough for a
launch not to count. CPU: a loop of at least a millisecond. An op that fails its parity check prints no speed.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt import backend, parity
from fastgpt.device import default_device, describe_machine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_SAMPLE, GPU_SAMPLE = 1e-3, 3e-4  # seconds that one timed sample lasts at least
MOST_SETS, MOST_BYTES = 64, 1 << 30  # of rotating inputs, by number and by memory
PROVENANCE = ("fastgpt", "sources", "torch", "device_name", "threads", "date")  # and commit, where there is a checkout


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def random(self, *shape: int, seed: int, dtype: torch.dtype | None = None, grad: bool = False) -> Tensor:
        """Normal values, never zeros; a leaf that requires grad on request."""
        generator = torch.Generator(self.device).manual_seed(seed)
        t = torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32).to(dtype or self.dtype)
        return t.requires_grad_() if grad else t


@dataclass(frozen=True)
class Job:
    """One call to time. `reset` comes before it, untimed: it restores what an in-place op overwrites."""

    run: Callable[[], Any]
    reset: Callable[[], Any] | None = None


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

    job(provider, setting, phase, seed) -> Job over its own input set. bytes_moved(shape, dtype, phase): the fewest bytes
    that the phase moves. gate_cases: (shape for parity, options) of what is measured. tiny: a shape whose maths is
    nothing, for the cost of a call on the host.
    """

    op: str
    phases: tuple[str, ...]
    job: Callable[[Provider, Setting, str, int], Job]
    bytes_moved: Callable[[tuple[int, ...], torch.dtype, str], int]
    providers: Callable[[Setting, bool], list[Provider]]
    gate_cases: Callable[[tuple[int, ...]], list[tuple[tuple[int, ...], dict[str, Any]]]]
    shapes: dict[str, tuple[int, ...]]
    tiny: tuple[int, ...]


@dataclass
class Samples:
    """Seconds per call of one provider, one entry per round."""

    seconds: list[float] = field(default_factory=list)

    def quantile(self, q: float) -> float:
        """By linear interpolation between the sorted samples."""
        return float(torch.tensor(self.seconds, dtype=torch.float64).quantile(q))


def ours(op: str, device: torch.device, fn: Callable[..., Any], **options: Any) -> list[Provider]:
    """One provider per kernel backend of `op` that runs on this device. Never Triton's interpreter: its times say nothing."""
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


def gate(bench: Bench, provider: Provider, setting: Setting) -> str | None:
    """Why this provider's figures must not be shown: parity at this dtype and row length; None if it holds."""
    every = [c for c in parity.cases(bench.op) if c.dtype == setting.dtype and c.layout == "contiguous"]
    picked = every[:: max(1, len(every) // 6)]
    for shape, options in bench.gate_cases(setting.shape):
        picked.append(parity.Case(bench.op, setting.dtype, "contiguous", shape, tuple(options.items())))
    try:
        rows = [r for c in picked for r in parity.check(c, provider.backend or "torch", setting.device.type)]
    except Exception as e:  # whatever stops a kernel from giving its result is a reason not to time it
        return f"{type(e).__name__}: {e}"
    bad = [r for r in rows if not r.ratio <= 1]
    return f"{bad[0].case} {bad[0].output}: error {bad[0].error:.2e}, allowed {bad[0].allowed:.2e}" if bad else None


def turns(names: list[str], number: int) -> list[str]:
    """The order of one round: everyone once, beginning one further each time, every other round backwards."""
    start = (number // 2) % len(names)
    order = names[start:] + names[:start]
    return order[::-1] if number % 2 else order


def time_cpu(
    jobs: dict[str, list[Job]],
    context: Callable[[str], AbstractContextManager[Any]],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Samples]:
    """Interleaved samples of each provider's jobs (one per input set) until `seconds` are over; at least 7 rounds."""
    repeats = {}
    for name, sets in jobs.items():
        with context(name):
            once = min(_sample(sets, 1, i, clock) for i in range(3))
        repeats[name] = 1 if sets[0].reset else max(1, math.ceil(CPU_SAMPLE / max(once, 1e-7)))
    samples = {name: Samples() for name in jobs}
    end, number = clock() + seconds, 0
    while number < 7 or (number < 1000 and clock() < end):
        for name in turns(list(jobs), number):
            with context(name):
                samples[name].seconds.append(_sample(jobs[name], repeats[name], number * repeats[name], clock))
        number += 1
    return samples


def _sample(sets: list[Job], repeats: int, first: int, clock: Callable[[], float]) -> float:
    """Seconds per call over `repeats` calls, on the input sets from number `first` on."""
    turn = [sets[(first + i) % len(sets)] for i in range(repeats)]
    if turn[0].reset:
        turn[0].reset()
    start = clock()
    for job in turn:
        job.run()
    return (clock() - start) / repeats


def time_gpu(
    make: dict[str, Callable[[], list[Job]]], context: Callable[[str], AbstractContextManager[Any]], seconds: float
) -> dict[str, Samples]:
    """Interleaved samples of CUDA graphs, launch by launch; each graph runs over all input sets of its provider."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # forward too: autograd runs backward on the stream of forward
        graphs = {}
        for name in make:
            with context(name):
                graphs[name] = _capture(make[name](), stream)
        samples = {name: Samples() for name in make}
        end, number = time.perf_counter() + seconds, 0
        while number < 7 or (number < 1000 and time.perf_counter() < end):
            torch.cuda._sleep(400_000)  # so that the host is ahead when the first graph starts
            events = {}
            for name in turns(list(graphs), number):
                graph, _, resets = graphs[name]
                for reset in resets:
                    reset()
                events[name] = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                events[name][0].record()
                graph.replay()
                events[name][1].record()
            stream.synchronize()
            for name, (start, stop) in events.items():
                samples[name].seconds.append(start.elapsed_time(stop) / 1e3 / graphs[name][1])
            number += 1
    return samples


def _capture(sets: list[Job], stream: torch.cuda.Stream) -> tuple[Any, int, list[Callable[[], Any]]]:
    """(graph, calls in it, what to do before each replay)."""
    resets = [job.reset for job in sets if job.reset]
    for _ in range(3):
        for job in sets:
            job.run()
    stream.synchronize()
    start = time.perf_counter()
    for job in sets:
        job.run()
    stream.synchronize()
    passes = 1 if resets else max(1, math.ceil(GPU_SAMPLE / (time.perf_counter() - start)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(passes):
            for job in sets:
                job.run()
    return graph, passes * len(sets), resets


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        return os.sysconf("SC_LEVEL3_CACHE_SIZE") or 32 << 20
    except (ValueError, OSError):  # not every C library tells
        return 32 << 20


def count_sets(bytes_of_one: int, device: torch.device) -> int:
    """How many input sets rotate, so that together they are twice the cache (within MOST_SETS and MOST_BYTES)."""
    wanted = math.ceil(2 * cache_bytes(device) / max(1, bytes_of_one))
    return max(1, min(wanted, MOST_SETS, MOST_BYTES // max(1, bytes_of_one)))


def copy_job(moved: int, setting: Setting, seed: int) -> Job:
    """A copy that reads and writes as many bytes together as an op moves: what it could reach at best."""
    generator = torch.Generator(setting.device).manual_seed(seed)
    n = max(1, moved // 8)
    source = torch.randn(n, generator=generator, device=setting.device)
    return Job(functools.partial(torch.empty_like(source).copy_, source))


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


def gpu_state(device: torch.device) -> dict[str, Any]:
    """Driver, clocks (MHz), power (W), temperature (C) from NVML: read, never set; empty where there is none."""
    if device.type != "cuda":
        return {}
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode())
        return {
            "driver": str(pynvml.nvmlSystemGetDriverVersion()),
            "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "celsius": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        }
    except Exception as e:  # the package, the library or one of its answers may be missing: the figure stands without
        return {"nvml": f"{type(e).__name__}: {e}"}


@functools.cache
def provenance(device: torch.device) -> dict[str, Any]:
    """Where a figure is from: machine, versions, commit, a digest of the code that ran, date."""
    package = Path(backend.__file__).parent
    digest = hashlib.sha256()
    folders = (package, Path(__file__).parent, package.parent / "kernels")  # the latter: an editable install's
    for path in sorted({p for f in folders for s in ("*.py", "*.so") for p in f.rglob(s)}):
        digest.update(path.name.encode() + path.read_bytes())
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {**describe_machine(device), "cuda": torch.version.cuda, "sources": digest.hexdigest()[:16], "date": now}


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a JSON Lines file.

    Raises:
        ValueError: a row without provenance.
    """
    rows = list(rows)
    for row in rows:
        lacking = [key for key in PROVENANCE if (row.get("machine") or {}).get(key) is None]
        if lacking:
            raise ValueError(f"append_rows: a row of {row.get('bench')} has no {', '.join(lacking)} in its machine")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
