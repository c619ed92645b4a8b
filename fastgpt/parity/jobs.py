"""Parity in several processes: each checks one piece of an op's cases on one backend at a time, rows as they come.

A case that raises costs a row of its own, and so does a case at which a process dies: a new process goes on with the
next case. The first check of a Triton kernel compiles it, so that a GPU machine's cores have most to do.
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

PIECE = 64  # cases at most: what waits for the last process to end is short


@dataclass(frozen=True)
class Piece:
    """Cases first to last - 1 of `cases_of(op, backend)`."""

    op: str
    backend: str
    first: int
    last: int


@functools.cache
def cases_of(op: str, name: str) -> list[Case]:
    """The cases of an op whose dtype the backend has a kernel for."""
    return [case for case in table.cases(op) if table.takes(name, case)]


def pieces(pairs: list[tuple[str, str]]) -> list[Piece]:
    """All cases of these (op, backend) pairs, none of two dtypes in a piece: CUDA's, then bf16's, then the others."""
    found = []
    for op, name in pairs:
        every = cases_of(op, name)
        for _, group in itertools.groupby(range(len(every)), key=lambda i: every[i].dtype):
            numbers = list(group)
            starts = range(numbers[0], numbers[-1] + 1, PIECE)
            found += [Piece(op, name, i, min(i + PIECE, numbers[-1] + 1)) for i in starts]

    def worth(piece: Piece) -> tuple[bool, bool, bool]:
        dtype = cases_of(piece.op, piece.backend)[piece.first].dtype
        return piece.backend != "cuda", dtype != torch.bfloat16, piece.op != "attention"  # the longest to compile

    return sorted(found, key=worth)


def failed(case: Case, name: str, why: str) -> Row:
    """A row that no bound allows."""
    dtype = str(case.dtype).split(".")[1]
    return Row(case.op, name, dtype, case.layouts, str(case), " ".join(why.split())[:300], math.inf, 0.0, 0.0)


def check(case: Case, name: str) -> list[Row]:
    """The rows of a case on the device of this machine; one row if the case raises."""
    try:
        return table.check(case, name, "cuda" if torch.cuda.is_available() else "cpu")
    except Exception as e:  # whatever stops a kernel is this case's result; the others have theirs
        return [failed(case, name, f"raised {type(e).__name__}: {e}")]


def usable() -> bool:
    """Whether the device still answers: after an illegal access a process gets errors alone."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception:
        return False
    return True


def run(work: list[Piece], jobs: int) -> Iterator[Row]:
    """The rows of all pieces in the order of their arrival, by `jobs` processes (1: by this one)."""
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
    """Give pieces to a process until none is left; where it died, to a new one."""
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
    """Let a process check a piece; returns what is left of it."""
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
    except BrokenPipeError:  # it died before
        pass
    if at < piece.last and not leaving:
        code = process.wait()
        rows.put(failed(cases_of(piece.op, piece.backend)[at], piece.backend, f"its process ended with code {code}"))
        at += 1
    elif leaving:
        process.wait()
    return Piece(piece.op, piece.backend, at, piece.last)


def serve(orders: IO[str], answers: IO[str]) -> None:
    """A process of `run`: a piece a line in, the rows of a case a line out, until the end of `orders`."""
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
    """Serve on standard input and output; what a library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
