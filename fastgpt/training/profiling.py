"""Measure the cost of a run: `--profile 10:15` traces steps or marks them for NVIDIA tools; Energy reads the GPU's
energy counter."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import emit_nvtx
from torch.profiler import ProfilerActivity, profile

from fastgpt.core.device import energy_joules
from fastgpt.core.errors import UserError

PERIOD = 1.0  # seconds; the counter itself is updated some ten times in a second


class Profile:
    """Profiler of steps "FIRST:LAST" of a run, counted from 1.

    torch: writes trace.json and profile.txt to the run's folder. nsys: puts every op in an NVTX range with its name,
    and these steps between cudaProfilerStart and Stop, which `nsys profile -c cudaProfilerApi` and `ncu` wait for.
    """

    def __init__(self, steps: str, profiler: str, folder: Path, device: torch.device) -> None:
        if profiler == "nsys" and device.type != "cuda":
            raise UserError(f"profiler is 'nsys', expected torch on a {device.type.upper()}")
        self.first, self.last = (int(n) for n in steps.split(":")) if steps else (0, 0)
        self.profiler, self.folder, self.device = profiler, folder, device
        self.watch: profile | None = None
        self.open = ExitStack()
        self.running, self.done = False, not steps

    def before(self, step: int) -> None:
        """Start profiling at the first of the steps; call it before each step."""
        if self.done or not self.first <= step <= self.last or self.running:
            return
        if self.profiler == "nsys":
            torch.cuda.profiler.start()
            self.open.callback(torch.cuda.profiler.stop)
            self.open.enter_context(emit_nvtx())
            self.open.callback(torch.cuda.synchronize)
        else:
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            self.watch = self.open.enter_context(profile(activities=kinds, profile_memory=True))
        self.running = True

    def after(self, step: int) -> str:
        """Stop profiling after the last of the steps; call it after each step. Returns what `close` returns, or ""."""
        return self.close() if self.running and step >= self.last else ""

    def close(self) -> str:
        """Stop profiling, at the latest when the run ends; return a sentence on what was written, else ""."""
        if not self.running:
            return ""
        self.open.close()
        self.running, self.done = False, True
        if self.watch is None:
            return f"profile: steps {self.first} to {self.last} are marked, and their ops are NVTX ranges"
        trace, table = self.folder / "trace.json", self.folder / "profile.txt"
        self.watch.export_chrome_trace(str(trace))
        sort = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table.write_text(self.watch.key_averages().table(sort_by=sort, row_limit=40), encoding="utf-8")
        self.watch = None
        return f"profile: {trace} (chrome://tracing or ui.perfetto.dev), {table}"


class Power:
    """Power of the GPU during training, from readings of its energy counter that are at least PERIOD seconds apart."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Leave out the time since the last reading."""
        self.joules, self.clock = energy_joules(self.device), time.perf_counter()

    def watts(self) -> float | None:
        """Return the mean since the last reading; None if that is too short ago, or without a counter."""
        seconds = time.perf_counter() - self.clock
        if self.joules is None or seconds < PERIOD:
            return None
        before = self.joules
        self.restart()
        return None if self.joules is None else (self.joules - before) / seconds


class Energy:
    """Energy used by the GPU since this object was created, including evaluations and checkpoints between steps."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.joules, self.clock = energy_joules(device), time.perf_counter()

    def figures(self, steps: int, batch_tokens: int) -> tuple[dict[str, Any], str]:
        """Return joules and watts over `steps` steps, and a sentence; both are empty without a counter or a step."""
        seconds, now = time.perf_counter() - self.clock, energy_joules(self.device)
        if self.joules is None or now is None or steps == 0:
            return {}, ""
        joules = now - self.joules
        return {"joules": joules, "watts": joules / seconds}, (
            f"energy: {joules / 3.6e6:.4g} kWh in {steps} steps, {joules / seconds:.0f} W on average, "
            f"{1e3 * joules / (steps * batch_tokens):.4g} mJ a token"
        )
