"""The output of a run for people and programs: console, progress bar, metrics.jsonl, loss.png."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.core import progress
from fastgpt.core.folders import write_text
from fastgpt.training.config import ENDLESS, TrainConfig, to_dict
from fastgpt.training.trackers import Trackers

PROGRESS, SAMPLES = "progress.json", "samples.jsonl"
AHEAD = 2  # steps that the host may launch before the device has finished the one before them


class Lagged:
    """Queue of numbers on their way from the device; the host does not wait, so the device always has a step to run."""

    def __init__(self, device: torch.device, exact: bool = False) -> None:
        self.device, self.exact = device, exact
        self.queue: deque[tuple[dict[str, Any], Tensor, Any]] = deque()

    def put(self, row: dict[str, Any], values: Tensor) -> None:
        cuda = self.device.type == "cuda"
        host = torch.empty(values.shape, pin_memory=cuda)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event() if cuda else None
        if event is not None:
            event.record(torch.cuda.current_stream(self.device))
        self.queue.append((row, host, event))

    def ready(self, ahead: int = AHEAD) -> Iterator[tuple[dict[str, Any], list[float]]]:
        """Yield rows whose numbers have arrived, oldest first; wait until at most `ahead` are missing. With `exact`
        yield none that came earlier, so that several processes have the same rows at the same step."""

        def here(event: Any) -> bool:
            return event is None or (not self.exact and event.query())

        while self.queue and (len(self.queue) > ahead or here(self.queue[0][2])):
            row, host, event = self.queue.popleft()
            if event is not None:
                event.synchronize()
            yield row, host.tolist()


class Pace:
    """A stopwatch for steps: the number of steps done, and the seconds of those after the first `warm` ones."""

    def __init__(self, warm: int) -> None:
        self.warm, self.steps, self.seconds = warm, 0, 0.0
        self.restart()

    def restart(self) -> None:
        """Count the time since the last step as part of no step."""
        self.clock = time.perf_counter()

    def step(self, arrived: int) -> float:
        """Return the seconds of each of the `arrived` steps done since the last call or restart."""
        now = time.perf_counter()
        each, self.clock = (now - self.clock) / arrived, now
        self.seconds += each * min(arrived, max(0, self.steps + arrived - self.warm))
        self.steps += arrived
        return each


def _drop_after(path: Path, step: int) -> None:
    """Drop the rows after `step`: a killed run may have logged steps after its checkpoint, which will run again. Rows
    that are damaged, as by a machine that lost power, are dropped, too."""
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        write_text(path, "".join(line for line in lines if line.endswith("\n") and _step_of(line) <= step))


def _step_of(line: str) -> float:
    """Return the step of a row of a log; infinity if the row is damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


class Log:
    """Log of the run in folder `run`, at step `step`: a progress bar, a line every log_every steps, metrics.jsonl,
    samples.jsonl, and progress.json, which says how long the run is and whether it is running."""

    def __init__(self, run: Path, cfg: TrainConfig, step: int, last_step: int) -> None:
        self.path, self.cfg = run / "metrics.jsonl", cfg
        for path in (self.path, run / SAMPLES):
            _drop_after(path, step)
        self.file = self.path.open("a", encoding="utf-8")
        self._progress(last_step)
        self.trackers = Trackers(cfg.trackers, run, to_dict(cfg))
        self.terminal = sys.stderr.isatty()
        self.bar = progress.bar(
            total=last_step if last_step < ENDLESS else None,
            initial=step,
            unit="step",
            mininterval=0.1 if self.terminal else 15.0,  # in a log file, each update of a bar is a line
            dynamic_ncols=True,
        )

    def _progress(self, last_step: int, ended: bool = False) -> None:
        """Write progress.json, for `fastgpt watch`; a full disk is left to the files that the run needs."""
        self.last_step = last_step
        of = last_step if last_step < ENDLESS else None
        row = {"last_step": of, "ended": ended, "process": os.getpid(), "host": platform.node()}
        with contextlib.suppress(OSError):
            write_text(self.path.with_name(PROGRESS), json.dumps(row))

    def row(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.trackers.put(row)

    def say(self, text: str) -> None:
        """Print a text above the progress bar; skip an empty one."""
        if text:
            progress.write(text) if self.terminal else print(text, flush=True)

    def sample(self, step: int, text: str) -> None:
        """Print a sample of the model at step `step`, and add it to samples.jsonl."""
        with self.path.with_name(SAMPLES).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "text": text}) + "\n")
        self.say(text)

    def checkpoints(self, written: list[Path]) -> None:
        """Print the paths of the checkpoints that have been written."""
        for path in written:
            self.say(f"checkpoint {path}")

    def step(self, row: dict[str, Any], last_step: int, figures: Sequence[str] = ()) -> None:
        self.row(row)
        if last_step != self.last_step:
            self._progress(last_step)
        self.bar.total = last_step if last_step < ENDLESS else None
        self.bar.update(1)
        self.bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tok/s", refresh=False)
        if row["step"] % self.cfg.log_every == 0 or row["step"] == last_step:
            of = f"/{last_step}" if last_step < ENDLESS else ""
            self.say(
                f"step {row['step']:>6}{of} | loss {row['loss']:.4f} | "
                + "".join(f"{name} {row[name]:.4g} | " for name in figures)
                + f"norm {row['grad_norm']:.3f} | "
                f"lr {row['lr']:.2e} | {row['tokens_per_second']:,.0f} tok/s | "
                f"mfu {row['mfu_causal']:.1%} causal, {row['mfu_full']:.1%} full | {row['memory_gb']:.2f} GB"
            )

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        self._progress(self.last_step, ended=True)
        self.trackers.close()

    def plot(self) -> Path | str:
        """Draw the loss curve of the whole run, resumes included; return the path of loss.png, or why there is none."""
        try:
            import matplotlib
        except ImportError:
            return "not drawn, since matplotlib is not installed"

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        fig, ax = plt.subplots(figsize=(8, 4.5))
        train = [(r["step"], r["loss"]) for r in rows if "loss" in r]
        val = sorted((r["step"], r["val_loss"]) for r in rows if "val_loss" in r)  # the last may be of the best step
        for points, name, style in ((train, "training", "-"), (val, "validation", "o-")):
            ax.plot(*zip(*points), style, label=name, linewidth=1) if points else None
        ax.set(xlabel="step", ylabel="loss (nats per token)", title=str(self.path.parent))
        ax.grid(alpha=0.3)
        ax.legend()
        fig.tight_layout()
        fig.savefig(self.path.with_name("loss.png"), dpi=120)
        plt.close(fig)
        return self.path.with_name("loss.png")


class Quiet(Log):
    """What the processes of a run other than the main one use in place of its log."""

    def __init__(self, run: Path) -> None:
        self.path = run / "metrics.jsonl"

    def row(self, row: dict[str, Any]) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def sample(self, step: int, text: str) -> None:
        pass

    def step(self, row: dict[str, Any], last_step: int, figures: Sequence[str] = ()) -> None:
        pass

    def close(self) -> None:
        pass

    def plot(self) -> Path | str:
        return ""
