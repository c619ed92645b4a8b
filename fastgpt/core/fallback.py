"""Falling back to PyTorch: logged once for each cause, an error in strict mode."""

from __future__ import annotations

import logging

log = logging.getLogger("fastgpt")

strict_mode: list[bool] = [False]  # a list, so that compiled code guards on its content; `ops.use` sets it
_reported: set[tuple[str, str]] = set()


def report_once(name: str, why: str) -> None:
    """Log why `name` falls back; the same reason is logged once per process."""
    if (name, why) not in _reported:
        _reported.add((name, why))
        log.warning("%s: %s", name, why)


def leave_to_torch(name: str, why: str) -> None:
    """Log, once, that a call of the drop-in `name` falls back to PyTorch.

    Raises:
        RuntimeError: in strict mode.
    """
    _leave_to_torch(name, why, strict_mode[0])


def _leave_to_torch(name: str, why: str, strict: bool) -> None:
    if strict:
        raise RuntimeError(f"{name}: {why}: only PyTorch supports this, and strict mode forbids the fallback")
    report_once(name, f"{why}: falling back to PyTorch")


# torch.compiler.assume_constant_result, as for backend._select: the warning comes while compiling.
_leave_to_torch._dynamo_marked_constant = True  # type: ignore[attr-defined]
