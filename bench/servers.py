"""Servers that `fastgpt bench serve` asks: fastgpt's and llama.cpp's, each in a process of its own on this machine."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

SECONDS_TO_START = 300.0


@dataclass(frozen=True)
class Running:
    """A server that answers.

    Attributes:
        name: of the program.
        port: at which it listens, on this machine.
        pid: of its process.
    """

    name: str
    port: int
    pid: int


def fastgpt_command(folder: Path, port: int, threads: int, rows: int, *more: str) -> list[str]:
    """Return the command of a server of fastgpt."""
    own = [sys.executable, "-m", "fastgpt.cli", "serve", f"m={folder}", "--device", "cpu", "--port", str(port)]
    return [*own, "--threads", str(threads), "--rows", str(rows), *more]


def llama_command(program: str, gguf: Path, port: int, threads: int, rows: int, tokens: int) -> list[str]:
    """Return the command of a server of llama.cpp with `rows` slots of `tokens` each and a cache in f32."""
    own = [program, "--model", str(gguf), "--host", "127.0.0.1", "--port", str(port), "--offline"]
    own += ["--threads", str(threads), "--threads-batch", str(threads), "--parallel", str(rows)]
    return [*own, "--ctx-size", str(rows * tokens), "--cache-type-k", "f32", "--cache-type-v", "f32"]


def find_llama(path: str | None) -> str | None:
    """Return the program of llama.cpp's server: the given one, or that of PATH."""
    return shutil.which(path or "llama-server")


def llama_version(program: str) -> str:
    """Return the version that the program names."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60)
    lines = (said.stdout + said.stderr).splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("version:")), "unknown")


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def started(name: str, command: Sequence[str], port: int, log: Path) -> Iterator[Running]:
    """Run a server while the block runs; what it prints goes to a file.

    Raises:
        RuntimeError: it ends, or does not answer in time; has its last lines.
    """
    with log.open("w", encoding="utf-8") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            end = time.monotonic() + SECONDS_TO_START
            while not _healthy(port):
                if process.poll() is not None or time.monotonic() > end:
                    last = " | ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:])
                    raise RuntimeError(f"{name} does not start: {last}")
                time.sleep(0.1)
            yield Running(name, port, process.pid)
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return int(answer.status) == 200
    except (urllib.error.URLError, OSError):
        return False


def processes(pid: int) -> list[int]:
    """Return a process and those that it started, and so on (Linux)."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            found += [p for child in children.read_text().split() for p in processes(int(child))]
    return found


def memory_mb(pid: int, key: str = "VmRSS") -> float:
    """Return the resident memory of a process and those that it started; with VmHWM the sum of their peaks."""
    total = 0.0
    for one in processes(pid):
        with suppress(OSError):  # it has ended
            lines = Path(f"/proc/{one}/status").read_text(encoding="utf-8").splitlines()
            total += next((int(line.split()[1]) / 1e3 for line in lines if line.startswith(f"{key}:")), 0.0)
    return total


def held(pid: int) -> dict[str, float]:
    """Return the open descriptors and the threads of a process and those that it started."""
    places = [Path(f"/proc/{one}") for one in processes(pid)]
    named = {"descriptors": "fd", "threads": "task"}
    return {name: float(sum(len(list((p / where).iterdir())) for p in places)) for name, where in named.items()}
