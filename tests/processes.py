"""Processes below another one, from /proc; none where there is no /proc."""

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
