"""`--profile 10:15`: a Chrome trace and a table of kernels of some steps of a run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class Profile:
    """Watches steps "FIRST:LAST" of a run, counted from 1, and writes trace.json and profile.txt to its folder."""

    def __init__(self, steps: str, folder: Path, device: torch.device) -> None:
        self.first, self.last = (int(n) for n in steps.split(":")) if steps else (0, 0)
        self.folder = folder
        self.sort = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self.watch = profile(activities=kinds, profile_memory=True) if self.first else None
        self.running = False

    def before(self, step: int) -> None:
        """Call it before each step."""
        if self.watch is not None and self.first <= step <= self.last and not self.running:
            self.watch.start()
            self.running = True

    def after(self, step: int) -> str:
        """Call it after each step; says what was written, if anything was."""
        if self.watch is None or not self.running or step < self.last:
            return ""
        return self.close()

    def close(self) -> str:
        """Ends it, at the latest when the run ends."""
        if self.watch is None or not self.running:
            return ""
        self.watch.stop()
        trace, table = self.folder / "trace.json", self.folder / "profile.txt"
        self.watch.export_chrome_trace(str(trace))
        table.write_text(self.watch.key_averages().table(sort_by=self.sort, row_limit=40), encoding="utf-8")
        self.watch, self.running = None, False
        return f"profile: {trace} (chrome://tracing or ui.perfetto.dev), {table}"
