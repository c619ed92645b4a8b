"""What interruptions cost, as the plan says; and eight hours of a job that is killed and reclaimed, by a fake clock."""

from __future__ import annotations

import json
import math
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import train
from fastgpt.training import checkpoint, steplog
from fastgpt.training.config import TrainConfig, load_config
from fastgpt.training.interruptions import DAY, FAILURES_PER_GPU_DAY, Interruptions
from fastgpt.training.plan import main as plan

STEP, WRITE, RESTART, NOTICE = 90.0, 30.0, 300.0, 120.0  # seconds of the fake clock
HOURS, MINUTES = 8, 10
INTERVAL = math.ceil(60 * MINUTES / STEP)  # steps between checkpoints


def test_the_interval_loses_the_least() -> None:
    """Daly's interval against the best of a search, and Young's as its limit for short checkpoints."""
    for failures, wait in ((1, 10.0), (24, 30.0), (100, 5.0)):
        kind = Interruptions(failures, wait, write=wait, restart=0.0)
        searched = max((kind.goodput(t), t) for t in (10.0 * 1.01**i for i in range(900)))
        assert kind.goodput() > searched[0] - 1e-3
        assert kind.interval == pytest.approx(searched[1], rel=0.25)
    rare = Interruptions(1.0, 0.01, write=0.01)
    assert rare.interval == pytest.approx(math.sqrt(2 * 0.01 * DAY), rel=1e-2)
    assert Interruptions(1.0, 1.0, write=9000.0).interval == 9000.0, "a checkpoint ends before the next begins"
    assert Interruptions(1e5, 10.0, write=0.1).interval == DAY / 1e5, "failures are more frequent than checkpoints"
    never = Interruptions(0.0, 1.0, write=1.0)
    assert never.interval == math.inf and never.goodput() == 1.0
    assert Interruptions(1000.0, 1.0, write=1.0).goodput() == 0.0


def test_the_goodput_is_that_of_drawn_failures() -> None:
    kind = Interruptions(failures=10.0, wait=20.0, write=20.0, restart=200.0)
    t, useful, wall, draw = kind.interval, 0.0, 0.0, random.Random(0)
    for _ in range(20000):
        lives = draw.expovariate(kind.failures / DAY)  # until a failure: whole intervals count, the rest is lost
        wall += lives + kind.restart
        useful += max(0.0, (lives - kind.write) // (t + kind.wait)) * t
    assert kind.goodput() == pytest.approx(useful / wall, rel=0.01)


def test_the_plan_has_the_cost_on_demand_and_on_spot(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--plan --config gpt2-124m --device a100 --gpus 8 --tokens 10e9 --price 2 --spot-price 0.8"
    assert plan([*words.split(), "--failures-per-day", "3", "--reclaims-per-day", "6"], "tiny") == 0
    *_, checkpoints, demand, spot, _, _ = capsys.readouterr().out.splitlines()
    state = 124_475_904 * 14  # bf16 weights; fp32 masters and two moments
    assert checkpoints.startswith(f"checkpoints of {state / 1e9:.2f} GB: --save-minutes "), checkpoints
    kinds = [Interruptions.of(state, 3.0, reclaims) for reclaims in (0.0, 6.0)]
    assert f"--save-minutes {kinds[0].interval / 60:.0f}, by Young and Daly, for 3 failures a day;" in checkpoints
    flops = 10e9 * 6 * 124_475_904
    for line, kind, price in zip((demand, spot), kinds, (2.0, 0.8), strict=True):
        hours = float(line.partition(": ")[2].split()[0])
        lost = float(line.partition(" hours, ")[2].split()[0])
        assert (hours - lost) == pytest.approx(kind.goodput() * hours, rel=0.05)
        cost = float(line.partition("cost ")[2].split()[0].replace(",", ""))
        assert cost == pytest.approx(hours * 8 * price, rel=0.02)
        assert hours * 3600 * 8 * 312e12 * 0.4 > flops
        assert f"({kind.goodput():.1%} goodput)" in line
    assert spot.startswith("on spot, with 6 reclaims a day: ")
    plan(words.split(), "tiny")
    assert f"for {8 * FAILURES_PER_GPU_DAY:.2g} failures a day (the rate of Llama 3" in capsys.readouterr().out
    plan([*words.split(), "--failures-per-day", "1e4"], "tiny")
    assert capsys.readouterr().out.count("the run never ends") == 2


# ---- eight hours


class Killed(BaseException):
    """The end of a process: no handler of errors sees it."""


class Job:
    """A job of several lives, by a fake clock that the parts of the trainer let pass.

    Attributes:
        events: (time, kind), the next one last: "kill" ends the process at any point, "write" within the next write of
            a checkpoint; "notice" sends SIGTERM.
        last: the last step that this life has done.
        lost: steps between where each life begins and the last one of the life before it.
        ends: the kinds of events in each life.
        noticed: time of the last SIGTERM.
    """

    def __init__(self, events: list[tuple[float, str]]) -> None:
        self.now, self.last, self.noticed = 0.0, 0, math.nan
        self.events = sorted(events, reverse=True)
        self.lost: list[int] = []
        self.ends: list[list[str]] = []

    def spend(self, seconds: float, writing: bool = False) -> None:
        self.now += seconds
        if self.events and self.now >= self.events[-1][0] and (writing or self.events[-1][1] != "write"):
            _, kind = self.events.pop()
            self.ends[-1].append(kind)
            if kind != "notice":
                raise Killed
            self.noticed = self.now
            os.kill(os.getpid(), signal.SIGTERM)

    def around(self, function: Callable[..., Any], seconds: float, writing: bool = False) -> Callable[..., Any]:
        """Return a function that takes this long, and may end before or after its work is done."""

        def spent(*arguments: Any, **options: Any) -> Any:
            self.spend(seconds / 2, writing)
            result = function(*arguments, **options)
            self.spend(seconds / 2, writing)
            return result

        return spent


class InTurn(checkpoint.Writer):
    """A writer that training waits for, so that the clock has one hand. What ends the process there ends it here."""

    def save(self, *arguments: Any, **options: Any) -> None:
        super().save(*arguments, **options)
        self._join()


def settings(out: Path) -> TrainConfig:
    data = out.parent / "ids_uint32.bin"  # ids without text: nothing but steps takes time
    data.write_bytes(torch.randint(64, (9000,), dtype=torch.int32, generator=torch.Generator().manual_seed(0)).numpy())
    words = "--model.n-layers 1 --model.n-heads 2 --model.width 16 --model.vocab-size 64 --block-size 16 --dtype fp32 "
    words += (
        "--micro-batch 2 --batch-tokens 32 --warmup-steps 2 --model.resid-dropout 0.1 --device cpu --max-minutes null "
    )
    words += f"--eval-every 100 --eval-batches 1 --save-every 0 --save-minutes {MINUTES} --log-every 1000 "
    words += f"--max-steps {int(HOURS * 3600 / STEP)}"
    return load_config([*words.split(), "--data", str(data), "--out", str(out)])


def work(job: Job, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the job to its end: start it again whenever it ends before."""
    optimizer_step, loop = train.optimizer_step, train.loop

    def update(*arguments: Any) -> Any:
        values = optimizer_step(*arguments)
        job.last = run.progress.step + 1
        return values

    def begin(run: Any, log: Any, stop: Any) -> None:
        job.lost.append(job.last - run.progress.step)
        job.last = run.progress.step
        job.ends.append([])
        loop(run, log, stop)

    monkeypatch.setattr(steplog, "monotonic", lambda: job.now)
    monkeypatch.setattr(train, "forward_backward", job.around(train.forward_backward, STEP / 2))
    monkeypatch.setattr(train, "optimizer_step", job.around(update, STEP / 2))
    monkeypatch.setattr(train, "loop", begin)
    monkeypatch.setattr(checkpoint, "save_file", job.around(checkpoint.save_file, WRITE / 2, writing=True))
    monkeypatch.setattr(checkpoint, "_sync", job.around(lambda path: None, 0.0, writing=True))  # no disk
    while True:
        run = train.prepare(settings(out))
        run.writer = InTurn()
        try:
            assert train.drive(run, lambda run, log: 0, "again") == 0
        except Killed:
            job.now += RESTART
            continue
        if run.progress.step == run.cfg.max_steps:
            return
        assert job.now - job.noticed <= NOTICE, "the step and its checkpoint end within the notice"
        job.now += RESTART


def result(out: Path) -> tuple[list[tuple[int, float]], bytes]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    weights = (checkpoint.find(out) / checkpoint.MODEL).read_bytes()
    return [(row["step"], row[name]) for row in rows for name in ("loss", "val_loss") if name in row], weights


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[tuple[int, float]], bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        job = Job([])
        work(job, out, monkeypatch)
    writes = math.ceil(HOURS * 3600 / STEP / INTERVAL)
    assert job.now == HOURS * 3600 + writes * WRITE, "one checkpoint every ten minutes, the last one at the end"
    return result(out)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_eight_hours_lose_at_most_an_interval_for_each_kill(
    seed: int,
    undisturbed: tuple[list[tuple[int, float]], bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chance, kinds = random.Random(seed), ["kill"] * 4 + ["write"] * 2 + ["notice"] * 2
    job = Job([(chance.uniform(0, HOURS * 3600), kind) for kind in kinds])
    work(job, tmp_path / "run", monkeypatch)
    assert sorted(kind for ends in job.ends for kind in ends) == sorted(kinds) and job.lost[0] == 0
    for ends, lost in zip(job.ends, job.lost[1:]):
        assert lost == 0 if ends == ["notice"] else 0 <= lost <= INTERVAL, (ends, lost)
    assert sum(job.lost) > 0
    assert result(tmp_path / "run") == undisturbed, "the same losses, and the same bits of the weights"
