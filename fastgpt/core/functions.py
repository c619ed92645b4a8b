"""A user's function from a Python file, named FILE.py:FUNCTION in the settings."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastgpt.core.errors import UserError


def open_function(spec: str, setting: str) -> Callable[..., Any]:
    """Return the function that "file.py:name" names; the file is run.

    Args:
        setting: its name, for messages.

    Raises:
        UserError: the file is missing, cannot be run, or has no such function.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise UserError(f"{setting} is {spec!r}, expected a Python file and a function in it, as in FILE.py:FUNCTION")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"{setting}: {file} is no Python file, expected one that ends with .py")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as e:
        raise UserError(f"{setting}: {file} cannot be run ({type(e).__name__}: {e})") from e
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{setting}: {file} has no function {name!r}")
    found: Callable[..., Any] = function
    return found
