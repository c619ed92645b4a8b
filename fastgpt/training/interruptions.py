"""Estimate what interruptions cost a run: how often to write a checkpoint, and the share of time that trains.

    interval  T = sqrt(2 d M) (1 + sqrt(d / 2M) / 3 + d / 18M) - d    between checkpoints; M if d >= 2M
    goodput   (1 - f (T/2 + w + R) - r (w + R)) / (1 + d/T)           share of the time in steps that are not repeated

    d  seconds that training waits for a checkpoint: the copy to the host, since the write is in the background
    w  seconds until a checkpoint is complete on disk
    R  seconds from an interruption to the next step
    f  failures a second, M = 1/f: they lose on average half an interval, the write in progress, and R
    r  reclaims of spot instances a second, with notice: they lose no step, but w and R

Source: Young, A First Order Approximation to the Optimum Checkpoint Interval, CACM 17, 1974 (the leading term); Daly, A
Higher Order Estimate of the Optimum Checkpoint Interval for Restart Dumps, FGCS 22, 2006.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Unexpected interruptions of the pretraining of Llama 3 405B: 419 in 54 days on 16,384 H100 (The Llama 3 Herd of
# Models, 2024, section 3.3.4)
FAILURES_PER_GPU_DAY = 419 / (54 * 16384)
RECLAIMS_PER_DAY = 1.0  # assumed: of a run on spot instances
RESTART = 300.0  # seconds, assumed: schedule a job, load libraries, data and checkpoint
STORAGE = 1e9  # bytes/s, assumed: one writer to a shared file system
HOST_COPY = 20e9  # bytes/s, assumed: from a GPU to host memory; PCIe 4.0 x16 has 32e9
DAY = 86400.0


@dataclass(frozen=True)
class Interruptions:
    """How often a run is interrupted, and what its checkpoints take.

    Attributes:
        failures: interruptions a day without notice.
        wait: seconds that training waits for a checkpoint.
        write: seconds until a checkpoint is complete.
        restart: seconds from an interruption to the next step.
        reclaims: interruptions a day with a notice that suffices for a checkpoint.
    """

    failures: float
    wait: float
    write: float
    restart: float = RESTART
    reclaims: float = 0.0

    @classmethod
    def of(cls, state: float, failures: float, reclaims: float = 0.0, storage: float = STORAGE) -> Interruptions:
        """Return those of a run whose checkpoints have `state` bytes, written at `storage` bytes/s."""
        return cls(failures, state / HOST_COPY, state / storage, reclaims=reclaims)

    @property
    def interval(self) -> float:
        """Seconds between checkpoints that lose the least time; infinite if nothing fails. A checkpoint begins after
        the one before it is complete."""
        if not self.failures:
            return math.inf
        d, m = self.wait, DAY / self.failures
        if d >= 2 * m:
            return max(m, self.write)
        best = math.sqrt(2 * d * m) * (1 + math.sqrt(d / (2 * m)) / 3 + d / (18 * m)) - d
        return max(best, self.write)

    def goodput(self, interval: float | None = None) -> float:
        """Return the share of the time in steps that are not repeated; 0 if a run never ends.

        interval: seconds between checkpoints; None is the best one.
        """
        t = self.interval if interval is None else interval
        failed = self.failures * (t / 2 + self.write + self.restart) if self.failures else 0.0
        lost = (failed + self.reclaims * (self.write + self.restart)) / DAY
        return max(0.0, 1 - lost) / (1 + self.wait / t)
