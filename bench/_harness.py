"""Shared parts of all benchmarks: interleaved timers, rotating inputs, memory, provenance, rows.

A figure is the median of interleaved samples with its 20 and 80 % quantiles. All candidates (fastgpt's backends,
PyTorch, a copy that moves as many bytes) run once per round, in an order that rotates from round to round, so a drift
of the machine affects all of them alike. Inputs are random and rotate among sets that together are larger than the
last cache. GPU: one CUDA graph over all sets, timed by events, long enough for the launch not to count. CPU: a loop of
at least a millisecond; samples during which the system preempted this process are excluded and counted.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib
import importlib.util
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.bench.results import PROVENANCE as PROVENANCE
from fastgpt.bench.results import append_rows as append_rows
from fastgpt.core.cards import datasheet_bandwidth, datasheet_peak
from fastgpt.core.device import cpu_name, describe_machine, nvml

try:
    import resource
except ImportError:  # not available on every system
    resource = None  # type: ignore[assignment]

CPU_SAMPLE, GPU_SAMPLE = 1e-3, 3e-4  # minimum seconds of one timed sample
LEAST_ROUNDS, MOST_ROUNDS, BLOCKS = 7, 1000, 4
MOST_SETS, MOST_BYTES = 64, 1 << 30  # limits on rotating inputs: number of sets, memory
Context = Callable[[str], AbstractContextManager[Any]]
Timed = tuple[dict[str, "Samples"], dict[str, str]]  # by name: samples of those that ran, errors of the others


@dataclass(frozen=True)
class Setting:
    """The shape, dtype, device and options that are measured."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def random(self, *shape: int, seed: int, dtype: torch.dtype | None = None, grad: bool = False) -> Tensor:
        """Return normal values without zeros, as a leaf that requires grad if `grad` is set."""
        generator = torch.Generator(self.device).manual_seed(seed)
        t = torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32).to(dtype or self.dtype)
        return t.requires_grad_() if grad else t

    def tensors(self, seed: int, *shapes: tuple[int, ...], grad: bool = False) -> list[Tensor]:
        """Return one random tensor per shape."""
        return [self.random(*shape, seed=100 * seed + 2 * i + grad, grad=grad) for i, shape in enumerate(shapes)]

    def tokens(self, vocab: int, *shape: int, seed: int) -> Tensor:
        """Return int64 token ids; rank r has probability ~ 1/(r+1), as in text."""
        u = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return ((vocab**u).long() - 1).to(self.device)


@dataclass(frozen=True)
class Job:
    """One call to time. `reset` runs before it, untimed, and restores what an in-place op overwrites."""

    run: Callable[[], Any]
    reset: Callable[[], Any] | None = None


@dataclass
class Samples:
    """Seconds per call of one provider, one entry per round.

    cut: the rounds in which the system preempted this process. Such a sample times the scheduler; figures exclude them
    wherever LEAST_ROUNDS others remain. starts: the rounds at which a block of rounds began.
    """

    seconds: list[float] = field(default_factory=list)
    cut: set[int] = field(default_factory=set)
    starts: list[int] = field(default_factory=list)

    def blocks(self) -> list[Samples]:
        """Return the samples of each block."""
        ends = [*self.starts[1:], len(self.seconds)]
        return [
            Samples(self.seconds[a:b], {i - a for i in self.cut if a <= i < b}) for a, b in zip(self.starts, ends)
        ] or [self]

    def kept(self) -> list[float]:
        """Return the samples that figures are computed from."""
        whole = [s for i, s in enumerate(self.seconds) if i not in self.cut]
        return whole if len(whole) >= LEAST_ROUNDS else self.seconds

    def quantile(self, q: float) -> float:
        """Return the q-quantile, interpolated linearly between the sorted samples."""
        return float(torch.tensor(self.kept(), dtype=torch.float64).quantile(q))

    def shares(self, other: Samples) -> Samples:
        """Return this provider's time as a share of the other's, round by round."""
        return Samples([a / b for a, b in zip(self.seconds, other.seconds)], self.cut | other.cut)

    def figures(self, unit: str = "ms") -> dict[str, float]:
        """Return a row's median and quantiles in ms or us, and the numbers of samples and of excluded samples."""
        scale = {"ms": 1e3, "us": 1e6}[unit]
        low, middle, high = (self.quantile(q) * scale for q in (0.2, 0.5, 0.8))
        count = {"samples": len(self.kept()), "cut_samples": len(self.seconds) - len(self.kept())}
        return {unit: middle, f"{unit}_q20": low, f"{unit}_q80": high, **count}

    def against(self, reference: Samples, name: str) -> dict[str, Any]:
        """Return a row's time as a share of the reference's time; both were timed in the same rounds.

        relative: median and quantiles over the rounds; relative_low: the ratio of the 20 % quantiles, as the median
        over the blocks. `compare` judges relative_low: other processes can only add time, so a low quantile is the
        best estimate of what the code itself costs.
        """
        shares = self.shares(reference)
        low, middle, high = (shares.quantile(q) for q in (0.2, 0.5, 0.8))
        row = {"reference": name, "relative": middle, "relative_q20": low, "relative_q80": high}
        low_shares = [a.quantile(0.2) / b.quantile(0.2) for a, b in zip(self.blocks(), reference.blocks())]
        return {**row, "relative_low": Samples(low_shares).quantile(0.5)}


def preemptions() -> int:
    """Return how often so far the system preempted a thread of this process; always 0 where it does not report it."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def turns(names: list[str], number: int) -> list[str]:
    """Return the order of one round: each name once, starting one name later each round, reversed every other round."""
    start = (number // 2) % len(names)
    order = names[start:] + names[:start]
    return order[::-1] if number % 2 else order


def resident_mb(key: str) -> float:
    """Return VmRSS or VmHWM of this process in MB (Linux; elsewhere NaN)."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith(key + ":")), math.nan)


def time_cpu(
    make: Mapping[str, Callable[[], list[Job]]],
    context: Context,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Timed:
    """Take interleaved samples of each provider's jobs (one job per input set) for `seconds`.

    The samples are taken in BLOCKS of rounds. Each block allocates new inputs unless that takes longer than its
    samples: where tensors happen to lie in memory can cost a tenth of an op's speed, for as long as they lie there.
    """
    start = clock()
    jobs, repeats, errors = _prepare(make, context, clock)
    samples = {name: Samples() for name in jobs}
    blocks = BLOCKS if jobs and clock() - start < seconds else 1
    for block in range(blocks):
        if block:
            jobs.clear()  # free the old inputs before the new ones are allocated
            for name in samples:
                with context(name):
                    jobs[name] = make[name]()
                    _sample(jobs[name], 1, 0, clock)
        for s in samples.values():
            s.starts.append(len(s.seconds))
        _time_block(jobs, repeats, samples, context, seconds / blocks, math.ceil(LEAST_ROUNDS / blocks), clock)
    return samples, errors


def _prepare(
    make: Mapping[str, Callable[[], list[Job]]], context: Context, clock: Callable[[], float]
) -> tuple[dict[str, list[Job]], dict[str, int], dict[str, str]]:
    """Return, by name, the jobs (each ran three times), the calls per sample, and the errors of those that failed."""
    jobs, repeats, errors = {}, {}, {}
    for name in make:
        try:
            with context(name):
                made = make[name]()
                once = min(_sample(made, 1, i, clock) for i in range(3))
        except Exception as e:  # a provider that cannot run must not end the comparison of the others
            errors[name] = f"{type(e).__name__}: {e}"
            continue
        jobs[name] = made
        repeats[name] = 1 if made[0].reset else max(1, math.ceil(CPU_SAMPLE / max(once, 1e-7)))
    return jobs, repeats, errors


def _time_block(
    jobs: dict[str, list[Job]],
    repeats: dict[str, int],
    samples: dict[str, Samples],
    context: Context,
    seconds: float,
    least: int,
    clock: Callable[[], float],
) -> None:
    """Run at least `least` rounds, for `seconds`; up to three times as long while fewer than `least` were kept."""
    start, number, whole = clock(), 0, 0
    while jobs and (
        number < least or (number < MOST_ROUNDS and clock() - start < (seconds if whole >= least else 3 * seconds))
    ):
        cut = False
        for name in turns(list(jobs), number):
            with context(name):
                before = preemptions()
                samples[name].seconds.append(_sample(jobs[name], repeats[name], number * repeats[name], clock))
                if preemptions() != before:
                    samples[name].cut.add(len(samples[name].seconds) - 1)
                    cut = True
        whole += not cut
        number += 1


def _sample(sets: list[Job], repeats: int, first: int, clock: Callable[[], float]) -> float:
    """Return seconds per call over `repeats` calls, on the input sets from number `first` on."""
    turn = [sets[(first + i) % len(sets)] for i in range(repeats)]
    if turn[0].reset:
        turn[0].reset()
    start = clock()
    for job in turn:
        job.run()
    return (clock() - start) / repeats


@dataclass
class Graph:
    """CUDA graph of `calls` jobs, the jobs (it points at their tensors), and the resets to run before a replay."""

    graph: Any
    calls: int
    jobs: list[Job]
    resets: list[Callable[[], Any]]


def time_gpu(make: Mapping[str, Callable[[], list[Job]]], context: Context, seconds: float) -> Timed:
    """Take interleaved samples of CUDA graphs, launch by launch; each graph runs over all of its own input sets."""
    stream = torch.cuda.Stream()
    graphs: dict[str, Graph] = {}
    errors = {}
    with torch.cuda.stream(stream):  # forward too: autograd runs backward on the stream of forward
        for name in make:
            try:
                with context(name):
                    graphs[name] = _capture(make[name](), stream)
            except Exception as e:  # as in _prepare
                errors[name] = f"{type(e).__name__}: {e}"
        samples = {name: Samples() for name in graphs}
        end, number = time.perf_counter() + seconds, 0
        while graphs and (number < LEAST_ROUNDS or (number < MOST_ROUNDS and time.perf_counter() < end)):
            _round(graphs, turns(list(graphs), number), samples, stream)
            number += 1
    return samples, errors


def _round(graphs: dict[str, Graph], order: list[str], samples: dict[str, Samples], stream: Any) -> None:
    torch.cuda._sleep(400_000)  # cycles: the host is then ahead of the device when the first graph starts
    events = {}
    for name in order:
        for reset in graphs[name].resets:
            reset()
        events[name] = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[name][0].record()
        graphs[name].graph.replay()
        events[name][1].record()
    stream.synchronize()
    for name, (start, stop) in events.items():
        samples[name].seconds.append(start.elapsed_time(stop) / 1e3 / graphs[name].calls)


def _capture(sets: list[Job], stream: Any) -> Graph:
    for _ in range(3):  # compiles, allocates, tunes
        for job in sets:
            job.run()
    stream.synchronize()
    start = time.perf_counter()
    for job in sets:
        job.run()
    stream.synchronize()
    resets = [job.reset for job in sets if job.reset]
    passes = 1 if resets else max(1, math.ceil(GPU_SAMPLE / (time.perf_counter() - start)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(passes):
            for job in sets:
                job.run()
    return Graph(graph, passes * len(sets), sets, resets)


def cache_bytes(device: torch.device) -> int:
    """Return the bytes of the last cache before memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        return os.sysconf("SC_LEVEL3_CACHE_SIZE") or 32 << 20
    except (ValueError, OSError):  # not every C library reports it
        return 32 << 20


def count_sets(bytes_of_one: int, device: torch.device) -> int:
    """Return how many input sets rotate: together twice the cache (within MOST_SETS and MOST_BYTES)."""
    wanted = math.ceil(2 * cache_bytes(device) / max(1, bytes_of_one))
    return max(1, min(wanted, MOST_SETS, MOST_BYTES // max(1, bytes_of_one)))


def copy_job(moved: int, setting: Setting, seed: int) -> Job:
    """Return a copy that reads and writes `moved` bytes in total: the best that an op moving as many could reach."""
    generator = torch.Generator(setting.device).manual_seed(seed)
    n = max(1, moved // 8)
    source = torch.randn(n, generator=generator, device=setting.device)
    return Job(functools.partial(torch.empty_like(source).copy_, source))


def gemm_job(flops: float, setting: Setting, seed: int) -> tuple[Job, float]:
    """Return a square matrix product in the same dtype, and how many of it make `flops`: the best an op could reach."""
    n = 64 * max(1, min(128, round((flops / 2) ** (1 / 3) / 64)))
    a, b = setting.tensors(seed, (n, n), (n, n))
    return Job(functools.partial(torch.mm, a, b)), flops / (2 * n**3)


def datasheet(setting: Setting, multiplies: bool) -> float | None:
    """Return the GPU's bandwidth (bytes/s) or its peak (FLOP/s) in 16 bits; None where no datasheet is known."""
    if setting.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(setting.device)
    if multiplies:
        return datasheet_peak(name) if setting.dtype.itemsize == 2 else None
    return datasheet_bandwidth(name)


def gpu_state(device: torch.device) -> dict[str, Any]:
    """Return driver, clocks (MHz), power (W) and temperature (C) from NVML: read, never set; empty without NVML."""
    if device.type != "cuda":
        return {}
    try:
        pynvml, handle = nvml(device)
        return {
            "driver": str(pynvml.nvmlSystemGetDriverVersion()),
            "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "celsius": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        }
    except Exception as e:  # the package, the library or an answer may be missing; figures are still valid
        return {"nvml": f"{type(e).__name__}: {e}"}


@functools.cache
def provenance(device: torch.device) -> dict[str, Any]:
    """Return the origin of a figure: machine, versions, commit (None from a wheel), a digest of the sources, date."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    machine = {**describe_machine(device), "cpu": cpu_name(), "cuda": torch.version.cuda}
    if device.type == "cpu":
        machine["device_name"] = machine["cpu"]
    return {**machine, "sources": sources(), "date": now}


def where(machine: dict[str, Any]) -> str:
    """Return machine, versions and commit in one line."""
    commit = machine["commit"] or f"sources {machine['sources']}"
    return (
        f"{machine['device_name']}, {machine['threads']} threads, torch {machine['torch']}, {commit}, {machine['date']}"
    )


def sources() -> str:
    """Return a digest of fastgpt's Python files and of the native sources that the binary was built from."""
    digest = hashlib.sha256()
    folders = [f for name in ("fastgpt", "fastgpt.kernels", "fastgpt.bench") for f in _folders(name)]
    files = {p.resolve() for f in folders for p in Path(f).rglob("*.py") if p.name != "_build_info.py"}
    for text in sorted(p.name.encode() + p.read_bytes() for p in files):  # sorted: equal for a checkout and a wheel
        digest.update(text)
    try:
        digest.update(importlib.import_module("fastgpt._build_info").SOURCES.encode())
    except ImportError:
        digest.update(b"not built")
    return digest.hexdigest()[:16]


def _folders(name: str) -> list[str]:
    spec = importlib.util.find_spec(name)
    return list(spec.submodule_search_locations or []) if spec else []
