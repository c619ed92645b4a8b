"""Parity in several processes. Each checks one piece of the cases of an op on one backend at a time.

A case that raises gets a row that fails. So does a case during which the process dies; a new process continues with the
next case. The first check of a Triton kernel compiles it, so on a GPU machine the CPU cores do most of the work.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import IO

import torch

from fastgpt.parity import table
from fastgpt.parity.rule import Case, Row

PIECE = 64  # cases at most: the wait for the last process stays short


@dataclass(frozen=True)
class Piece:
    """The cases first to last - 1 of `cases_of(op, backend)`."""

    op: str
    backend: str
    first: int
    last: int


@functools.cache
def cases_of(op: str, name: str) -> list[Case]:
    """Return the cases of an op for whose dtype the backend has a kernel."""
    return [case for case in table.cases(op) if table.takes(name, case)]


def pieces(pairs: list[tuple[str, str]]) -> list[Piece]:
    """Split the cases of these (op, backend) pairs into pieces of one dtype: CUDA first, then bf16, then the others."""
    found = []
    for op, name in pairs:
        every = cases_of(op, name)
        for _, group in itertools.groupby(range(len(every)), key=lambda i: every[i].dtype):
            numbers = list(group)
            starts = range(numbers[0], numbers[-1] + 1, PIECE)
            found += [Piece(op, name, i, min(i + PIECE, numbers[-1] + 1)) for i in starts]

    def worth(piece: Piece) -> tuple[bool, bool, bool]:
        dtype = cases_of(piece.op, piece.backend)[piece.first].dtype
        return piece.backend != "cuda", dtype != torch.bfloat16, piece.op != "attention"  # attention compiles longest

    return sorted(found, key=worth)


def failed(case: Case, name: str, why: str) -> Row:
    """Return a row that fails every bound."""
    dtype = str(case.dtype).split(".")[1]
    return Row(case.op, name, dtype, case.layouts, str(case), " ".join(why.split())[:300], math.inf, 0.0, 0.0)


def check(case: Case, name: str) -> list[Row]:
    """Return the rows of a case on the device of this machine; one row if the case raises."""
    try:
        return table.check(case, name, "cuda" if torch.cuda.is_available() else "cpu")
    except Exception as e:  # any error is the result of this case; other cases still run
        return [failed(case, name, f"raised {type(e).__name__}: {e}")]


def usable() -> bool:
    """Return whether the device still works; after an illegal access, every call of the process fails."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception:
        return False
    return True


def run(work: list[Piece], jobs: int) -> Iterator[Row]:
    """Yield the rows of all pieces in the order of their arrival, from `jobs` processes (1: this one)."""
    if jobs == 1:
        for piece in work:
            for case in cases_of(piece.op, piece.backend)[piece.first : piece.last]:
                yield from check(case, piece.backend)
        return
    left: queue.SimpleQueue[Piece] = queue.SimpleQueue()
    rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
    for piece in work:
        left.put(piece)
    running = min(jobs, len(work))
    threads = max(1, (os.cpu_count() or 1) // jobs)
    for _ in range(running):
        threading.Thread(target=_supervise, args=(left, rows, threads), daemon=True).start()
    while running:
        row = rows.get()
        if row is None:
            running -= 1
        else:
            yield row


def _supervise(left: queue.SimpleQueue[Piece], rows: queue.SimpleQueue[Row | None], threads: int) -> None:
    """Pass pieces to a process until none is left; replace the process if it dies."""
    process: subprocess.Popen[str] | None = None
    while not left.empty():
        try:
            piece = left.get_nowait()
        except queue.Empty:
            break
        while piece.first < piece.last:
            if process is None or process.poll() is not None:
                process = _start(threads)
            piece = _give(piece, process, rows)
    if process is not None and process.stdin is not None:
        process.stdin.close()
        process.wait()
    rows.put(None)


def _start(threads: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "fastgpt.parity.jobs"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _give(piece: Piece, process: subprocess.Popen[str], rows: queue.SimpleQueue[Row | None]) -> Piece:
    """Let a process check a piece, and return the part that is left."""
    assert process.stdin is not None and process.stdout is not None
    at, leaving = piece.first, False
    try:
        process.stdin.write(json.dumps(asdict(piece)) + "\n")
        process.stdin.flush()
        while at < piece.last and not leaving and (line := process.stdout.readline()).endswith("\n"):
            answer = json.loads(line)
            for fields in answer["rows"]:
                fields.pop("ratio")
                rows.put(Row(**fields))
            at, leaving = at + 1, answer["leaving"]
    except BrokenPipeError:  # the process has died
        pass
    if at < piece.last and not leaving:
        code = process.wait()
        rows.put(failed(cases_of(piece.op, piece.backend)[at], piece.backend, f"its process ended with code {code}"))
        at += 1
    elif leaving:
        process.wait()
    return Piece(piece.op, piece.backend, at, piece.last)


def serve(orders: IO[str], answers: IO[str]) -> None:
    """Run a process of `run`: read a piece from each line of `orders`, write the rows of each case as a line."""
    for line in orders:
        piece = Piece(**json.loads(line))
        for case in cases_of(piece.op, piece.backend)[piece.first : piece.last]:
            found = check(case, piece.backend)
            leaving = not usable()
            answers.write(json.dumps({"rows": [asdict(r) for r in found], "leaving": leaving}) + "\n")
            answers.flush()
            if leaving:
                return


def main() -> int:
    """Serve on standard input and output; redirect what libraries print to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
