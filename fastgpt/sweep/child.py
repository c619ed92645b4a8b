"""The process of a run: `fastgpt train` that alone uses its folder, and that stops when the sweep is gone.

`python -m fastgpt.sweep.child FOLDER ARGUMENT ...` is started by pool.py with a pipe as its input. The pipe ends with
the sweep, however that ended; the run then writes a checkpoint and stops, as after SIGTERM.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
from pathlib import Path

LOCK = ".lock"


def _stop_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main(folder: str, arguments: list[str]) -> int:
    """Train with the arguments of fastgpt train, once no other process uses the folder of the run."""
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    with (Path(folder) / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        from fastgpt.core.command import run_command
        from fastgpt.train import main as train

        return run_command(lambda: train(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
