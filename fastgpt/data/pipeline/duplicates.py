"""The package fastgpt.data.dedup, imported at first use."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from fastgpt.core.errors import UserError

Settings = Any  # fastgpt.data.dedup.DedupSettings


def package() -> Any:
    """Return the package. Raises UserError if this version has none."""
    if importlib.util.find_spec("fastgpt.data.dedup") is None:
        raise UserError("this version has no deduplication and decontamination: set dedup: false, decontaminate: []")
    return importlib.import_module("fastgpt.data.dedup")
