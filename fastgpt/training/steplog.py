"""Log the losses of a run's steps as they arrive from the device."""

from __future__ import annotations

import math
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from fastgpt.core.device import memory_gb, peak_flops
from fastgpt.core.errors import UserError
from fastgpt.training import checkpoint
from fastgpt.training.profiling import Power
from fastgpt.training.run import Run
from fastgpt.training.runlog import AHEAD, Lagged, Log, Pace
from fastgpt.training.stop import Stop

WARM_STEPS = 6  # not counted when speed is measured; graphs are recorded in the fourth
MEASURED_STEPS = 15  # after these, the number of steps of a run limited by minutes is set
STOP_AFTER_SKIPS = 10  # skipped steps in a row


class StepLog:
    """Log that lets the host run at most AHEAD steps ahead of the device, and logs each step when its values arrive.

    Step times are measured on arrival, so they are device times. They determine the length of a run limited by minutes.
    A run is aborted after STOP_AFTER_SKIPS skipped steps in a row.
    """

    def __init__(self, run: Run, log: Log) -> None:
        self.run, self.log = run, log
        self.lagged, self.pace = Lagged(run.device, exact=run.mesh.world > 1), Pace(WARM_STEPS)
        self._wishes: Tensor | None = None  # (2,): processes that want to end, and to save, in the step just launched
        self._agreed, self._save_agreed, self._saved_at = False, False, monotonic()
        self.power = Power(run.device)

    def ended(self, stop: Stop) -> bool:
        """Return whether the run should end before its length. Several processes agree on that with the losses of a
        step, so all of them end after the same one."""
        return self._agreed if self.run.mesh.world > 1 else stop.asked or self.run.too_slow()

    def save_due(self) -> bool:
        """Return whether save_minutes have passed since the last checkpoint. Several processes agree on that with the
        losses of a step, by the clock of the main one. The last step is saved anyway."""
        p = self.run.progress
        overdue = self._save_agreed if self.run.mesh.world > 1 else self._overdue()
        return overdue and p.step < p.last_step

    def saved(self) -> None:
        """Begin to count save_minutes anew, after `wait`."""
        self._save_agreed, self._saved_at = False, monotonic()

    def _overdue(self) -> bool:
        minutes = self.run.cfg.save_minutes
        return minutes > 0 and monotonic() - self._saved_at >= 60 * minutes

    def summed(self, loss: Tensor, stop: Stop) -> Tensor:
        """Return the loss and figures of a step, summed over the processes."""
        mesh = self.run.mesh
        if mesh.world == 1:
            return loss
        ends, saves = stop.asked or self.run.too_slow(), mesh.main and self._overdue()
        both = mesh.sum(torch.cat((loss, *(loss.new_full((1,), float(wish)) for wish in (ends, saves)))))
        self._wishes = both[-2:]
        return both[:-2]

    def put(self, rate: float, values: Tensor) -> None:
        """Queue the step just launched: its learning rate, and (loss, gradient norm, spike,
        figures of the task) on the device."""
        p = self.run.progress
        row = {"step": p.step, "tokens": p.tokens, "lr": rate, "memory_gb": memory_gb(self.run.device)}
        self.lagged.put(row, values if self._wishes is None else torch.cat((values, self._wishes)))
        self._log(AHEAD)

    def wait(self) -> None:
        """Wait for all queued steps and log them."""
        self._log(0)

    def restart(self) -> None:
        """Count the time since the last step, spent on evaluation or a checkpoint, as part of no step."""
        self.pace.restart()
        self.power.restart()

    def _log(self, ahead: int) -> None:
        run, p, pace = self.run, self.run.progress, self.pace
        arrived = list(self.lagged.ready(ahead))
        seconds = pace.step(len(arrived)) if arrived else 0.0
        watts = self.power.watts() if arrived else None
        for row, (loss, norm, spike, *figures) in arrived:
            if self._wishes is not None:
                *figures, ends, saves = figures
                self._agreed, self._save_agreed = self._agreed or ends > 0, self._save_agreed or saves > 0
            p.seconds += seconds if p.length_known or pace.steps > WARM_STEPS else 0.0
            row.update(loss=loss, grad_norm=norm, seconds=p.seconds, **self._speed(seconds))
            row.update(zip(run.task.figures, figures, strict=True))
            row.update({} if watts is None else {"power_watts": watts})
            applied = math.isfinite(norm) and math.isfinite(loss) and not spike
            row.update({} if applied else {"skipped": 1})
            self.log.step(row, p.last_step, run.task.figures)
            for sentence in run.task.watch(row):
                self.log.say(sentence)
            if not p.length_known and pace.steps >= MEASURED_STEPS:
                each = run.mesh.share(pace.seconds / (pace.steps - WARM_STEPS))
                self.log.say(run.fix_length(int(row["step"]), each))
            if applied:
                p.skipped = 0
            else:
                self._skipped(row, spike)

    def _speed(self, seconds: float) -> dict[str, float]:
        """Return tokens per second and model FLOP utilisation of a step that took `seconds`."""
        run = self.run
        speed = run.cfg.batch_tokens / seconds
        peak = run.mesh.world * peak_flops(run.device, next(run.model.parameters()).dtype)[0]
        flops = run.model.flops_per_token(run.cfg.block_size)
        return {"tokens_per_second": speed, **{f"mfu_{name}": f * speed / peak for name, f in flops.items()}}

    def _skipped(self, row: dict[str, Any], spike: float) -> None:
        cfg, p, loss, norm = self.run.cfg, self.run.progress, row["loss"], row["grad_norm"]
        p.skipped += 1
        why = (
            f": more than {cfg.spike_sigmas:g} standard deviations (spike_sigmas) above recent losses" if spike else ""
        )
        said = f"step {row['step']}: loss {loss:.4f}, gradient norm {norm:.3g}: the step was skipped{why}"
        self.log.say(said)
        if p.skipped >= STOP_AFTER_SKIPS:
            good = checkpoint.checkpoints(self.run.folder)
            last = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
            raise UserError(
                f"training: {p.skipped} steps in a row were skipped, the last with loss {loss:.4g} and gradient norm "
                f"{norm:.3g}; {last}; try a lower lr than {cfg.lr}"
            )
