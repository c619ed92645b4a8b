"""Files in the user's cache folder: which backend was measured as fastest, and which kernels passed their self-check.

Each file is valid for one machine in its present state: its name contains a hash of `machine_facts`. An unusable file
counts as missing: `fastgpt tune` rewrites the table, and the next process repeats the self-checks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from fastgpt.core import native
from fastgpt.core.device import cpu_name, package_version

log = logging.getLogger("fastgpt")


def machine_facts(device: str) -> dict[str, str]:
    """Return the facts a stored result depends on: the device, its driver, and versions of everything that makes
    kernels."""
    facts = {"torch": torch.__version__, "triton": package_version("triton"), "native": native.identity()}
    if device != "cuda":
        return {"device": cpu_name(), "threads": str(torch.get_num_threads()), **facts}
    driver = Path("/proc/driver/nvidia/version")
    facts["driver"] = driver.read_text(encoding="utf-8") if driver.exists() else ""
    return {"device": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda), **facts}


def folder() -> Path:
    """Return fastgpt's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgpt"


def _file(kind: str, device: str) -> Path:
    """Return the path of the user's file of this kind for this machine in its present state."""
    key = hashlib.sha256(json.dumps(machine_facts(device), sort_keys=True).encode()).hexdigest()[:16]
    return folder() / f"{kind}-{key}.json"


def _write_json(path: Path, content: Any) -> None:
    """Write a temporary file and rename it, so a reader sees the old file or the new one, never a partial one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as f:
        json.dump(content, f, indent=1)
    os.replace(f.name, path)


def read_passed() -> list[str]:
    """Return the kernels ("<op>.<backend>") whose self-check passed on this machine before.

    Every process repeats the self-checks that failed.
    """
    try:
        passed = json.loads(_file("selfcheck", "cuda").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return passed if isinstance(passed, list) else []


def write_passed(names: Collection[str]) -> None:
    """Store the names of the kernels whose self-check passed; in a read-only home the checks are merely repeated."""
    try:
        _write_json(_file("selfcheck", "cuda"), sorted(names))
    except OSError:
        pass


def read_tuned(device: str, backends: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return the table of measured backends; empty if there is none.

    A file is ignored with a warning if it is not in the form that `write_tuned` writes, or if an entry names a backend
    that is not in `backends`.
    """
    try:
        path = _file("tuned", device)
        text = path.read_text(encoding="utf-8")
    except (OSError, RuntimeError, AssertionError):  # the last two: a device that is not here
        return {}
    try:
        content = json.loads(text)
        if content["facts"] != machine_facts(device):
            raise ValueError("it was written for another machine or version")
        for name, entry in content["entries"].items():
            if entry["backend"] not in backends or not isinstance(entry["date"], str) or not entry["note"]:
                raise ValueError(f"its entry {name} has no backend, date or note")
        return dict(content["entries"])
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        log.warning("tune: %s is ignored (%s: %s); fastgpt tune writes a new one", path, type(e).__name__, e)
        return {}


def write_tuned(device: str, entries: dict[str, dict[str, Any]]) -> Path:
    """Replace the table of measured backends ("<op>.<dtype>" -> {"backend", "date", "note", ...}).

    Raises:
        OSError: the user's cache folder cannot be written to.
    """
    path = _file("tuned", device)
    _write_json(path, {"facts": machine_facts(device), "entries": entries})
    return path
