"""How the host runs ahead of a device (here a fake one whose streams are queues with a clock): how far ahead, how
time is measured, and on which device's stream the end of a step is detected."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import train
from fastgpt.training import runlog, steplog, task
from fastgpt.training.config import load_config
from fastgpt.training.stop import Stop

HOST, DEVICE = 0.004, 0.26  # seconds per step
TEXT = "".join(f"line {i * i % 97} of many\n" for i in range(3000))


class Stream:
    """Work that runs in order; `done` is when the last of it ends."""

    def __init__(self) -> None:
        self.done = 0.0


class Machine:
    """Two GPUs with one stream each, and the host's clock; the first GPU is the current one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.streams = 1.0, (Stream(), Stream())
        machine, empty = self, torch.empty

        class Event:
            def record(self, stream: Stream | None = None) -> None:
                self.at = (machine.streams[0] if stream is None else stream).done

            def query(self) -> bool:
                return machine.now >= self.at

            def synchronize(self) -> None:
                machine.now = max(machine.now, self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.streams[device.index])
        monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
        monkeypatch.setattr(runlog.time, "perf_counter", lambda: self.now)

    def launch(self, number: int, seconds: float) -> None:
        stream = self.streams[number]
        stream.done = max(stream.done, self.now) + seconds


def test_numbers_are_read_when_their_own_device_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    lagged = runlog.Lagged(torch.device("cuda:1"))
    machine.launch(1, 5.0)
    lagged.put({"step": 1}, torch.ones(3))
    assert not list(lagged.ready()) and machine.now == 1.0
    machine.now += 5.0
    assert [row["step"] for row, _ in lagged.ready()] == [1]


def test_the_length_in_minutes_is_the_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real loop on a device that is 65 times slower than the host trains for one minute, and the learning rate
    reaches its end."""
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    small = "--model.n-layers 1 --model.n-heads 1 --model.width 16 --block-size 16 --micro-batch 2 --batch-tokens 32 "
    small += "--device cpu --vocab-size 300 --out run --data text.txt --log-every 500 --save-every 30 "
    small += "--eval-every 60 --max-minutes 1"
    cfg = load_config(small.split())
    run = train.prepare(cfg)
    run.folder.mkdir()
    machine, behind = Machine(monkeypatch), []

    def step(*args: Any) -> torch.Tensor:
        machine.now += HOST + (1.5 if run.progress.step == 3 else 0.0)  # the fourth step is recorded
        behind.append(machine.streams[0].done - machine.now)
        machine.launch(0, DEVICE)
        return torch.tensor([3.0, 1.0, 0.0])

    def validation(*args: Any) -> dict[str, float]:
        machine.now = max(machine.now, machine.streams[0].done) + 2.0
        return {"loss": 3.0}

    monkeypatch.setattr(train, "forward_backward", lambda *args: torch.zeros(1))
    monkeypatch.setattr(train, "optimizer_step", step)
    monkeypatch.setattr(task, "mean_over", validation)
    monkeypatch.setattr(steplog, "peak_flops", lambda *args: (1e12, "fake"))
    monkeypatch.setattr(steplog, "Lagged", lambda device, exact: runlog.Lagged(torch.device("cuda:0")))
    monkeypatch.setattr(run, "save", lambda: None)
    with Stop() as stop, closing(runlog.Log(run.folder, cfg, 0, run.progress.last_step)) as log:
        train.loop(run, log, stop)
    p, rows = run.progress, [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert p.step == p.last_step == len(steps) and abs(p.step * DEVICE - 60) < 3, "no limit cut it off"
    assert abs(p.seconds - 60) < 3 and steps[-1]["lr"] == pytest.approx(cfg.lr * cfg.min_lr_ratio, rel=0.01)
    assert 2 * DEVICE < max(behind) + DEVICE < 3.1 * DEVICE, "two steps ahead of the one that runs, no more"
    speeds = [row["tokens_per_second"] * DEVICE / cfg.batch_tokens for row in steps[steplog.WARM_STEPS :]]
    assert 0.95 < min(speeds) and max(speeds) < 1.05, "a step's time is the device's, after a validation too"
