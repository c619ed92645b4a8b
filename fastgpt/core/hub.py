"""huggingface_hub: its import, and its errors in one sentence."""

from __future__ import annotations

import importlib
from typing import Any

from fastgpt.core.errors import UserError


def hub(why: str) -> Any:
    """Return the module huggingface_hub.

    Raises:
        UserError: it is not installed; `why` says what needs it.
    """
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise UserError(f"{why} needs huggingface_hub, expected `pip install huggingface_hub`") from None


def reason(e: Exception, name: str, revision: str = "main", kind: str = "model") -> str:
    """Return what an error of huggingface_hub means. kind: "model" or "data set"."""
    kinds, status = {kind.__name__ for kind in type(e).__mro__}, getattr(getattr(e, "response", None), "status_code", 0)
    path = name if kind == "model" else f"datasets/{name}"
    login = "log in with `hf auth login`"
    if "GatedRepoError" in kinds:
        return f"the hub gives no access to it: accept its terms at huggingface.co/{path}, then {login}"
    if "RepositoryNotFoundError" in kinds:
        return f"the hub has no {kind} of this name; if it is private, {login}"
    if "RevisionNotFoundError" in kinds:
        return f"the hub has no revision {revision!r} of it"
    if status in (401, 403):
        return f"the hub refuses it: {login}"
    if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "TransportError", "ConnectionError"}:
        return "the hub cannot be reached"
    return " ".join(f"the hub failed ({type(e).__name__}: {e})".split())[:300]
