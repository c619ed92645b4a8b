"""Checkpoints by time in several processes: all of them save after the same step."""

import json
from pathlib import Path

import pytest
import torch
from spread.launch import torchrun

from fastgpt.training import checkpoint

STEPS = 40


@pytest.mark.slow
def test_processes_agree_when_minutes_are_over(tmp_path: Path) -> None:
    data = tmp_path / "ids_uint32.bin"
    data.write_bytes(torch.randint(64, (4000,), dtype=torch.int32).numpy())
    words = "--config tiny --device cpu --model.n-layers 1 --model.n-heads 2 --model.width 16 --model.vocab-size 64 "
    words += f"--block-size 16 --micro-batch 1 --batch-tokens 32 --max-steps {STEPS} --eval-every 0 --eval-batches 1 "
    words += f"--save-every 0 --save-minutes 1e-5 --keep 0 --data {data} --out {tmp_path / 'run'}"
    done = torchrun(2, "-m", "fastgpt.train", *words.split())
    assert done.returncode == 0, done.stderr
    saved = checkpoint.checkpoints(tmp_path / "run")
    assert 5 < len(saved) <= STEPS, "0.6 ms are over with each step, and known two steps later"
    for path in saved:
        state = checkpoint.read_state(path)
        assert state["progress"]["step"] == state["step"] == int(path.name.removeprefix("step_"))
        checkpoint.read_tensors(path, checkpoint.MODEL, state)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [row["step"] for row in map(json.loads, rows) if "loss" in row] == list(range(1, STEPS + 1))
