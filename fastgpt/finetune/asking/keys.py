"""Keys for endpoints, from environment variables that the user names."""

from __future__ import annotations

import os

from fastgpt.core.errors import UserError


def key_of(variable: str | None) -> str:
    """Return the value of an environment variable; empty without one.

    Raises:
        UserError: it is not set, or empty.
    """
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"the environment variable {variable} is not set, expected the key for the endpoint")
    return key
