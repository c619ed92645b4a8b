"""Settings of `fastgpt train` as a sweep's file has them, and as text for a command line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

from fastgpt.core import options
from fastgpt.core.errors import UserError
from fastgpt.core.options import key_types
from fastgpt.training.config import TrainConfig

OWN = {"out": "--out", "resume": "the sweep itself", "seed": "seeds"}  # what sets them for each run of a sweep


def flat(settings: Mapping[str, Any], where: str) -> dict[str, str]:
    """Return dotted setting -> value as text.

    Args:
        where: where the settings stand, for messages.

    Raises:
        UserError: a setting is unknown, is given twice, or is one that the sweep sets.
    """
    found: dict[str, str] = {}
    for key, value in pairs(settings, where):
        if key in found:
            raise UserError(f"{where} sets {key} twice, expected each setting once")
        found[key] = text_of(value)
    return found


def pairs(settings: Mapping[str, Any], where: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted settings and their values; names may have hyphens or underscores, and `model` may be nested.

    Raises:
        UserError: a setting is unknown, or one that the sweep sets.
    """
    types_of = key_types(TrainConfig)
    for name, value in settings.items():
        key = prefix + name.replace("-", "_")
        if key in OWN:
            raise UserError(f"{where} sets {key}, which {OWN[key]} sets in a sweep")
        if key not in types_of:
            raise UserError(f"{where}: {options.unknown(key, types_of)}")
        if not is_dataclass(types_of[key]):
            yield key, value
        elif isinstance(value, Mapping):
            yield from pairs(value, where, key + ".")
        else:
            raise UserError(f"{where}: {key} is {value!r}, expected a mapping of its settings")


def text_of(value: Any) -> str:
    """Return a value, whose scalars may be text, as text on a command line."""
    return "null" if value is None else value if isinstance(value, str) else json.dumps(value)
