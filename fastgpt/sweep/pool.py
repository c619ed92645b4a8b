"""Run the jobs of a sweep, several at a time: each is a process of `fastgpt train` on one of the devices."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fastgpt.report.rows import Tail
from fastgpt.sweep import outcome
from fastgpt.sweep.jobs import Job, Source
from fastgpt.sweep.outcome import OUTPUT, Outcome
from fastgpt.sweep.spec import Spec
from fastgpt.training import checkpoint
from fastgpt.training.metric import full_name
from fastgpt.training.stop import Stop

CHILD = [sys.executable, "-m", "fastgpt.sweep.child"]
PERIOD = 0.2  # seconds between two looks at the runs
GRACE = 120.0  # seconds that a run has to write a checkpoint after SIGTERM
ATTEMPTS = 3  # starts of a run that another program's signals stop


@dataclass
class Running:
    """A run whose process has been started.

    Attributes:
        slot: number of its place among those that run at a time.
        pruned: value and step of the validation that ended it.
    """

    job: Job
    slot: int
    process: subprocess.Popen[bytes]
    tail: Tail
    attempt: int = 1
    pruned: tuple[float, int] | None = None
    asked: float = field(default=0.0)  # when it was told to end


class Pool:
    """The runs of a sweep at work.

    Args:
        done: called with each job and its outcome.
    """

    def __init__(self, spec: Spec, source: Source, done: Callable[[Job, Outcome], None]) -> None:
        self.spec, self.source, self.done = spec, source, done
        self.slots = spec.parallel or max(1, len(spec.devices))
        self.running: list[Running] = []

    def run(self, stop: Stop) -> None:
        """Run until the source has no more jobs, or a signal stops the sweep; then the runs write checkpoints."""
        try:
            while not stop.asked:
                self._fill()
                if not self.running:
                    return
                time.sleep(PERIOD)
                for one in list(self.running):
                    self._look(one)
        finally:
            self._stop_all()

    def _fill(self) -> None:
        while len(self.running) < self.slots and (job := self.source.next()) is not None:
            free = min(set(range(self.slots)) - {one.slot for one in self.running})
            self.running.append(self._start(job, free, 1))

    def _start(self, job: Job, slot: int, attempt: int) -> Running:
        devices = self.spec.devices
        device = devices[slot % len(devices)] if devices else None
        command = [*CHILD, str(job.folder), *job.command(device)]
        environment = dict(os.environ)
        if self.slots > 1:  # so that runs on a CPU do not take each other's cores
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.slots)))
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / outcome.LAST_FILE).unlink(missing_ok=True)
        with (job.folder / OUTPUT).open("ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # ends with this process, and the run with it
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C in a terminal is for the sweep alone
            )
        return Running(job, slot, process, Tail(job.folder / "metrics.jsonl"), attempt)

    def _look(self, one: Running) -> None:
        """Read the validations of a run, and take note of its end."""
        code = one.process.poll()  # before the rows, so that those of a run that ended are all read
        one.tail.replaced()
        for row in one.tail.read():
            name = full_name(self.spec.metric, row)
            if "loss" in row or name is None or one.pruned:
                continue
            if self.source.report(one.job, row[name], row["step"]) and code is None:
                one.pruned = row[name], row["step"]
                self._terminate(one)
        if code is not None:
            self._end(one, code)
        elif one.asked and time.monotonic() > one.asked + GRACE:
            one.process.kill()

    def _terminate(self, one: Running) -> None:
        one.asked = time.monotonic()
        one.process.terminate()

    def _end(self, one: Running, code: int) -> None:
        self.running.remove(one)
        _close(one)
        job, metric = one.job, self.spec.metric
        if one.pruned is not None:
            found = outcome.pruned(job.folder, metric, job.arguments, job.seed, *one.pruned)
        elif code in (0, -signal.SIGTERM) and not outcome.has_finished(job.folder) and one.attempt < ATTEMPTS:
            self.running.append(self._start(job, one.slot, one.attempt + 1))  # another program stopped it: resume it
            return
        else:
            found = outcome.of_end(job.folder, metric, job.arguments, job.seed, code)
        outcome.write(job.folder, found)
        if not self.spec.keep_checkpoints:
            remove_checkpoints(job.folder)
        self.source.ended(job)
        self.done(job, found)

    def _stop_all(self) -> None:
        """Let the runs write checkpoints and end; what does not end in time is killed."""
        for one in self.running:
            one.process.terminate()
        deadline = time.monotonic() + GRACE
        try:
            for one in self.running:
                one.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:  # also after a second Ctrl-C
            for one in self.running:
                if one.process.poll() is None:
                    one.process.kill()
                _close(one)


def _close(one: Running) -> None:
    one.process.wait()
    if one.process.stdin is not None:
        one.process.stdin.close()


def remove_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a run."""
    for path in checkpoint.checkpoints(folder):
        shutil.rmtree(path, ignore_errors=True)
