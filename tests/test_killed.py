"""A run that is killed at any moment, even while writing a checkpoint, and started again: every loss has the same
bits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastgpt import train

SMALL = (
    "--model.n-layers 2 --model.n-heads 2 --model.width 64 --block-size 64 --micro-batch 2 --batch-tokens 256 "
    "--max-minutes null --warmup-steps 2 --eval-every 5 --eval-batches 2 --save-every 3 --log-every 50 "
    "--sample-tokens 4 --model.attn-dropout 0.1 --model.resid-dropout 0.1 --device cpu"
).split()


def start(folder: Path, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fastgpt.train", *SMALL, *arguments, "--out", name]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[bytes]) -> None:
    output = process.communicate(timeout=900)[0].decode()
    assert process.returncode == 0, output[-3000:]


def rows(folder: Path, name: str) -> list[tuple[int, float, float]]:
    """Return (step, loss or validation loss, gradient norm) of every line."""
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r.get("loss", r.get("val_loss")), r.get("grad_norm", 0.0)) for r in lines]


def written(folder: Path, name: str) -> int:
    """Return the number of complete lines; a run in progress may be writing one more."""
    path = folder / name / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at_random(folder: Path, arguments: list[str], kills: int, steps: int, seed: int) -> None:
    """Kill the run that many times, each a random time after it got further than before; then let it finish."""
    chance = random.Random(seed)
    for number in range(kills):
        process = start(folder, "killed", arguments)
        goal, deadline = steps * (number + 1) // (kills + 2), time.time() + 120
        while time.time() < deadline and process.poll() is None and written(folder, "killed") < goal:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    finish(start(folder, "killed", arguments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds only a text."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "text").mkdir()
    for path in sorted(Path(train.__file__).parent.rglob("*.py")):
        (folder / "text" / f"{path.stem}.txt").write_text(path.read_text())
    return folder


@pytest.mark.parametrize("kernels, batch", [("auto", "2"), ("torch", "1")])
def test_killed_runs_end_bit_identical(folder: Path, kernels: str, batch: str, tmp_path: Path) -> None:
    arguments = ["--data", str(folder / "text"), "--vocab-size", "300", "--max-steps", "40"]
    arguments += ["--kernels", f"all={kernels}", "--micro-batch", batch]
    finish(start(tmp_path, "whole", arguments))
    kill_at_random(tmp_path, arguments, 3, 40, seed=int(batch))
    assert rows(tmp_path, "killed") == rows(tmp_path, "whole")
    assert len({step for step, *_ in rows(tmp_path, "killed")}) == 40


@pytest.mark.extended
def test_twenty_kills_on_the_default_corpus(tmp_path: Path) -> None:
    arguments = ["--config", "tiny", "--max-minutes", "null", "--max-steps", "300", "--save-every", "10"]
    finish(start(tmp_path, "whole", arguments))
    kill_at_random(tmp_path, arguments, 20, 300, seed=0)
    assert rows(tmp_path, "killed") == rows(tmp_path, "whole")
    assert len({step for step, *_ in rows(tmp_path, "killed")}) == 300
