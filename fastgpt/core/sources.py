"""Digest of csrc/, noted in a build by setup.py, compared by core.native. Imports nothing of fastgpt or torch."""

from __future__ import annotations

import hashlib
from pathlib import Path


def sources_hash(root: Path) -> str:
    """Return a digest of the compiled kernels' sources in the checkout `root`; empty if there are none."""
    files = sorted(p for p in (root / "csrc").rglob("*") if p.suffix in (".cpp", ".cu", ".h", ".cuh"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16] if files else ""
