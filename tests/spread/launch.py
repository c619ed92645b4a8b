"""Start processes as torchrun does."""

import os
import subprocess
import sys
from pathlib import Path

SECONDS = 300


def torchrun(count: int, *command: str, **options: str) -> "subprocess.CompletedProcess[str]":
    """Run a module ("-m", name, ...) or a script in `count` processes of one thread each on this machine."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *command]
    here = {**os.environ, "OMP_NUM_THREADS": "1", **options}
    return subprocess.run(run, env=here, capture_output=True, text=True, timeout=SECONDS)


def script(name: str) -> str:
    """Return the path of a script beside this file."""
    return str(Path(__file__).with_name(name))
