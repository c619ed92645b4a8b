"""fastgpt: train GPT models with a readable loop and custom kernels that work in any PyTorch model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastgpt._version import __version__

if TYPE_CHECKING:
    from fastgpt import ops
    from fastgpt.patching import patch, patch_report, unpatch

__all__ = ["__version__", "ops", "patch", "patch_report", "unpatch"]


def __getattr__(name: str) -> Any:
    """Import ops, patch, unpatch and patch_report at their first use: the import of PyTorch takes seconds, and a
    command that is interrupted meanwhile must be able to say so."""
    if name == "ops":
        return importlib.import_module("fastgpt.ops")
    if name in ("patch", "patch_report", "unpatch"):
        return getattr(importlib.import_module("fastgpt.patching"), name)
    raise AttributeError(f"module 'fastgpt' has no attribute {name!r}")
