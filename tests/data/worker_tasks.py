"""Tasks for workers: a worker must be able to import them, so they are not in a file of tests."""

import os
import random
import signal
import threading
import time
from pathlib import Path


def die_once(task: tuple[Path, int]) -> int:
    folder, i = task
    if i == 2 and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return i * i


def die(task: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_later_once(task: tuple[Path, int]) -> bytes:
    """Return 4 MB; odd ones are killed at a random moment after they have begun, mostly while they send."""
    folder, i = task
    if i % 2 and not (folder / str(i)).exists():
        (folder / str(i)).touch()
        threading.Timer(random.Random(i).uniform(0, 0.02), os.kill, (os.getpid(), signal.SIGKILL)).start()
    time.sleep(0.005)
    return bytes([i]) * 4_000_000


def divide(task: int) -> float:
    return 1 / task
