"""`fastgpt train` in several processes: the same losses, exact resumption, and one end for all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from spread.launch import torchrun

from fastgpt.training import checkpoint

pytestmark = pytest.mark.slow

SETTINGS = [
    *("--config", "tiny", "--device", "cpu", "--model.n-layers", "2", "--model.n-heads", "2", "--model.width", "32"),
    *(
        "--vocab-size",
        "300",
        "--block-size",
        "32",
        "--micro-batch",
        "2",
        "--batch-tokens",
        "512",
        "--warmup-steps",
        "2",
    ),
    *("--eval-every", "5", "--eval-batches", "4", "--save-every", "5", "--keep", "9", "--sample-tokens", "3"),
]


def train(count: int, out: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    """Train on texts beside the run's folder, in one process or several."""
    data = out.parent / "text.txt"
    if not data.exists():
        data.write_text("\n".join(f"{i} times {j} is {i * j}" for i in range(60) for j in range(60)))
    arguments = [*SETTINGS, "--data", str(data), "--out", str(out), *more]
    if count > 1:
        return torchrun(count, "-m", "fastgpt.train", *arguments)
    here = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "fastgpt.train", *arguments], env=here, capture_output=True, text=True)


def losses(run: Path) -> dict[tuple[int, str], float]:
    """Return the losses of a run's steps and validations."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], name): row[name] for row in rows for name in ("loss", "val_loss") if name in row}


def weights(run: Path) -> bytes:
    return (checkpoint.find(run) / checkpoint.MODEL).read_bytes()


@pytest.mark.parametrize(("parallel", "optimizer"), [("ddp", "adamw"), ("fsdp", "adamw"), ("fsdp", "muon")])
def test_losses_are_those_of_one_process_and_a_killed_run_ends_in_the_same_bits(
    parallel: str, optimizer: str, tmp_path: Path
) -> None:
    one, two, length = tmp_path / "one", tmp_path / "two", ("--max-steps", "8", "--optimizer", optimizer)
    assert train(1, one, *length).returncode == 0
    done = train(2, two, *length, "--parallel", parallel)
    assert done.returncode == 0, done.stderr
    assert losses(two).keys() == losses(one).keys() and (8, "val_loss") in losses(one)
    for key, loss in losses(one).items():
        assert losses(two)[key] == pytest.approx(loss, rel=1e-5), key
    whole = weights(two)
    shutil.rmtree(two / "step_00000008")  # as if it was killed after step 5
    other = shutil.copytree(two, tmp_path / "other")
    assert train(2, two, *length, "--parallel", parallel).returncode == 0
    assert weights(two) == whole
    assert train(1, other, *length).returncode == 0  # on another number of processes: the same tokens
    assert losses(other)[8, "loss"] == pytest.approx(losses(two)[8, "loss"], rel=1e-5)


def test_a_signal_to_one_process_ends_all_after_the_same_step(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(2, out, "--max-steps", "1").returncode == 0  # makes the data
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "fastgpt.train",
    ]
    run += [*SETTINGS, "--data", str(tmp_path / "text.txt"), "--out", str(out), "--max-steps", "100000"]
    process = subprocess.Popen(run, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)
    while not (out / "step_00000010").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert "to resume" in said
    newest = checkpoint.find(out)
    assert json.loads((newest / checkpoint.STATE).read_text())["progress"]["step"] > 10


def test_what_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    done = train(2, tmp_path / "run", "--max-steps", "1", "--batch-tokens", "64")
    assert done.returncode != 0
    sentences = [line for line in done.stderr.splitlines() if "batch_tokens is 64, expected a multiple of" in line]
    assert sentences and "Traceback" not in done.stderr.split("batch_tokens is 64")[0]
