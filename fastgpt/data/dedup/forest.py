"""Clusters of documents as a forest in one array (union-find), joined many pairs at a time."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

IN_MEMORY = 1 << 28  # bytes; a larger array lies in a file


def allocate(count: int, dtype: type, scratch: Path | None) -> np.ndarray:
    """Return an array of zeros: in a nameless file in `scratch` if it is large, else in memory."""
    if scratch is None or count * np.dtype(dtype).itemsize <= IN_MEMORY:
        return np.zeros(count, dtype)
    with tempfile.TemporaryFile(dir=scratch) as file:  # the map keeps the file until the array is gone
        return np.memmap(file, dtype, "w+", shape=(count,))


class Forest:
    """Disjoint sets of the numbers 0 to count - 1. The root of each set is its smallest member.

    Args:
        count: documents, below 2^32
        scratch: folder for the array if it is large, 4 bytes a document
    """

    def __init__(self, count: int, scratch: Path | None = None) -> None:
        self.parent = allocate(count, np.uint32, scratch)
        for start in range(0, count, 1 << 20):
            end = min(start + (1 << 20), count)
            self.parent[start:end] = np.arange(start, end, dtype=np.uint32)

    def roots(self, members: np.ndarray) -> np.ndarray:
        """Return the root of each member's set: (n,) uint32."""
        roots = self.parent[members]
        while True:
            above = self.parent[roots]
            if np.array_equal(above, roots):
                self.parent[members] = roots
                return roots
            roots = above

    def union(self, a: np.ndarray, b: np.ndarray) -> None:
        """Join the sets of a[i] and b[i] for each i."""
        while len(a):
            a, b = self.roots(a), self.roots(b)
            apart = a != b
            a, b = a[apart], b[apart]
            np.minimum.at(self.parent, np.maximum(a, b), np.minimum(a, b))

    def flatten(self) -> None:
        """Let every member point at its root."""
        for start in range(0, len(self.parent), 1 << 20):
            members = slice(start, min(start + (1 << 20), len(self.parent)))
            self.parent[members] = self.roots(np.arange(members.start, members.stop, dtype=np.uint32))
