"""Start processes as torchrun does."""

import os
import subprocess
import sys
from pathlib import Path

SECONDS = 300
SETTINGS = (
    "--config tiny --device cpu --model.n-layers 2 --model.n-heads 2 --model.width 32 --vocab-size 300 --block-size 32 "
    "--micro-batch 2 --batch-tokens 512 --warmup-steps 2 --eval-every 5 --eval-batches 4 --save-every 5 --keep 9 "
    "--sample-tokens 3"
).split()


def torchrun(count: int, *command: str, restarts: int = 0) -> "subprocess.CompletedProcess[str]":
    """Run a module ("-m", name, ...) or a script in `count` processes of one thread each on this machine."""
    here = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = starts(count, *command, restarts=restarts)
    return subprocess.run(run, env=here, capture_output=True, text=True, timeout=SECONDS)


def starts(count: int, *command: str, restarts: int = 0) -> list[str]:
    """Return the command line of `torchrun`."""
    options = ["--standalone", "--nproc-per-node", str(count), "--max-restarts", str(restarts)]
    return [sys.executable, "-m", "torch.distributed.run", *options, *command]


def train(
    out: Path, *more: str, count: int = 1, breaks: str = "none 0", restarts: int = 0
) -> "subprocess.CompletedProcess[str]":
    """Train on texts beside the run's folder, in one process or several, of which one may fail as broken_train.py
    says."""
    arguments = [*SETTINGS, "--data", str(text_beside(out)), "--out", str(out), *more]
    if count > 1:
        return torchrun(count, script("broken_train.py"), *breaks.split(), *arguments, restarts=restarts)
    here = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "fastgpt.train", *arguments]
    return subprocess.run(run, env=here, capture_output=True, text=True, timeout=SECONDS)


def text_beside(out: Path) -> Path:
    """Return a text to train on, in the folder of the run's folder."""
    data = out.parent / "text.txt"
    if not data.exists():
        data.write_text("\n".join(f"{i} times {j} is {i * j}" for i in range(60) for j in range(60)))
    return data


def script(name: str) -> str:
    """Return the path of a script beside this file."""
    return str(Path(__file__).with_name(name))
