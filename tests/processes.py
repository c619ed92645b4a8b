"""Processes below another one, from /proc; none where there is no /proc."""

import time
from collections.abc import Iterable
from pathlib import Path


def parents() -> dict[int, int]:
    """Return the parent of every process that is no zombie."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            found[int(path.parent.name)] = int(parent)
    return found


def descendants(pid: int) -> list[int]:
    """Return the processes below one."""
    below = parents()
    found = [pid]
    for p in found:
        found += [child for child, parent in below.items() if parent == p]
    return found[1:]


def outlive(pids: Iterable[int], seconds: float = 60.0) -> set[int]:
    """Return those of some processes that still run after a while: workers that a build has told to end, or that
    notice that it is gone, need a moment."""
    left, deadline = set(pids), time.monotonic() + seconds
    while (left := left & parents().keys()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def command_line(pid: int) -> str:
    """Return the command line of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
