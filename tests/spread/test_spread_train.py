"""`fastgpt train` in several processes: the same losses, exact resumption, and one end for all."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from spread.launch import SETTINGS, starts, text_beside, train

from fastgpt.training import checkpoint
from fastgpt.training.load import load_run

pytestmark = pytest.mark.slow

DROPOUT = ("--model.attn-dropout", "0.1", "--model.resid-dropout", "0.1")


def figures(run: Path) -> dict[tuple[int, str], float]:
    """Return the losses and gradient norms of a run's steps and validations."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "grad_norm", "val_loss")
    return {(row["step"], name): row[name] for row in rows for name in names if name in row}


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Return all that the newest checkpoint of a run holds: weights, optimizer, random states."""
    path = checkpoint.find(run)
    state = checkpoint.read_state(path)
    both = (checkpoint.read_tensors(path, kind, state) for kind in (checkpoint.MODEL, checkpoint.OPTIMIZER))
    return {name: t for found in both for name, t in found.items()}


def sentences(done: "subprocess.CompletedProcess[str]") -> list[str]:
    """Return the errors that processes reported, which may follow a progress bar on its line."""
    return re.findall("fastgpt: error: (.*)", done.stderr)


@pytest.mark.parametrize(
    "parallel, optimizer",
    [*(pytest.param(how, "adamw", marks=pytest.mark.extended) for how in ("ddp", "fsdp")), ("fsdp", "muon")],
)
def test_figures_are_those_of_one_process_and_other_numbers_resume(
    parallel: str, optimizer: str, tmp_path: Path
) -> None:
    one, two, length = tmp_path / "one", tmp_path / "two", ("--max-steps", "8", "--optimizer", optimizer)
    assert train(one, *length).returncode == 0
    done = train(two, *length, "--parallel", parallel, count=2)
    assert done.returncode == 0, done.stderr
    expected = figures(one)
    assert figures(two).keys() == expected.keys() and (8, "val_loss") in expected
    for key, value in expected.items():
        assert figures(two)[key] == pytest.approx(value, rel=1e-5), key
    shutil.rmtree(two / "step_00000008")  # as if it was killed after step 5
    assert len(list((two / "step_00000005").glob("model.*"))) == (1 if parallel == "ddp" else 2)
    for count in (1, 4) if optimizer == "adamw" else (1,):
        other = shutil.copytree(two, tmp_path / f"in-{count}")
        done = train(other, *length, *(("--parallel", "fsdp") if count > 1 else ()), count=count)
        assert done.returncode == 0, done.stderr
        assert "resumed at step 5" in done.stdout
        for key, value in expected.items():  # the same tokens, none lost and none repeated
            assert figures(other)[key] == pytest.approx(value, rel=1e-5), (count, key)


@pytest.mark.parametrize(  # muon has AdamW for the rest
    "parallel, optimizer, breaks",
    [pytest.param("ddp", "adamw", "kill 10", marks=pytest.mark.extended), ("fsdp", "muon", "write 10")],
)
def test_a_killed_process_and_a_restart_change_no_bit(
    parallel: str, optimizer: str, breaks: str, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = ("--max-steps", "12", "--parallel", parallel, "--optimizer", optimizer, *DROPOUT)
    assert train(whole, *settings, count=2).returncode == 0
    done = train(killed, *settings, count=2, breaks=breaks, restarts=1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resumed at step 5") == 1, "no half checkpoint"
    assert not list(killed.glob(".*_000*")), "nothing is left of it"
    assert sentences(done) == ["process 0 stops: another process has ended without an error"], done.stderr
    assert "Traceback" not in done.stderr
    found, expected = tensors(killed), tensors(whole)
    assert found.keys() == expected.keys() and "rng.cpu.1" in found
    assert [name for name, t in expected.items() if not torch.equal(found[name], t)] == []
    if parallel == "fsdp":
        model, _, path = load_run(killed, torch.device("cpu"))
        assert path.name == "step_00000012" and torch.equal(model.wte.weight, expected["wte.weight"])


@pytest.mark.parametrize(
    "breaks, sentence",
    [
        ("raise 5", "process 0 stops: process 1 failed with ValueError: a fault of process 1"),
        ("refuse 5", "process 1 wants other settings"),
    ],
)
def test_an_error_in_one_process_is_one_sentence(breaks: str, sentence: str, tmp_path: Path) -> None:
    done = train(tmp_path / "run", "--max-steps", "9", count=2, breaks=breaks)
    assert done.returncode != 0
    assert sentences(done) == [sentence], done.stderr
    shown = re.findall(r"\[rank(\d)\]: Traceback", done.stderr)
    assert shown == ["1"] * breaks.startswith("raise"), "only the process that fails shows a traceback"


def test_a_signal_to_one_process_ends_all_after_the_same_step(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = [*SETTINGS, "--data", str(text_beside(out)), "--out", str(out), "--max-steps", "100000"]
    run = starts(2, "-m", "fastgpt.train", *arguments)
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
    done = train(tmp_path / "run", "--max-steps", "1", "--batch-tokens", "64", count=2)
    assert done.returncode != 0
    assert done.stderr.count("batch_tokens is 64, expected a multiple of") == 1
    assert "Traceback" not in done.stderr.split("batch_tokens is 64")[0]
