"""The values that a search tries: lists and ranges of settings, and points among them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.core.options import WRONG, convert, describe, key_types
from fastgpt.sweep.settings import pairs, text_of
from fastgpt.training.config import TrainConfig

RANGE = ("low", "high", "step", "log")
MOST_CORNERS = 128  # combinations that are checked before a search begins


@dataclass(frozen=True)
class Choices:
    """Values of a setting, as text on a command line."""

    key: str
    values: tuple[str, ...]

    def ends(self) -> tuple[str, ...]:
        """Return the values that must be valid."""
        return self.values

    def points(self) -> tuple[str, ...]:
        """Return every value."""
        return self.values

    def describe(self) -> str:
        """Return the values in words."""
        return "one of " + ", ".join(self.values)


@dataclass(frozen=True)
class Range:
    """Numbers of a setting from low to high, both included; whole ones if both are."""

    key: str
    low: float
    high: float
    step: float | None = None
    log: bool = False

    def ends(self) -> tuple[str, ...]:
        """Return the values that must be valid."""
        return repr(self.low), repr(self.high)

    def points(self) -> tuple[str, ...]:
        """Return every value.

        Raises:
            UserError: there is no step.
        """
        if self.step is None:
            raise UserError(f"search.{self.key} is a range without step, expected a list or a step with sampler grid")
        n = round((self.high - self.low) / self.step) + 1
        return tuple(text_of_number(self.low + i * self.step) for i in range(n))

    def describe(self) -> str:
        """Return the range in words."""
        how = " on a logarithmic scale" if self.log else f" in steps of {self.step}" if self.step else ""
        return f"{self.low} to {self.high}{how}"


Dimension = Choices | Range


def text_of_number(value: float) -> str:
    """Return a number as text, without the digits that sums of steps add."""
    return repr(value) if isinstance(value, int) else repr(float(f"{value:.12g}"))


def dimensions(search: Mapping[str, Any]) -> list[Dimension]:
    """Return the settings to search and their values.

    Raises:
        UserError: a setting is unknown, is given twice, or is one that the sweep sets; values are none, equal, or not
            of the setting's type; a range is empty or has keys that contradict each other.
    """
    types_of = key_types(TrainConfig)
    found: dict[str, Dimension] = {}
    for key, values in pairs(search, "search"):
        if key in found:
            raise UserError(f"search sets {key} twice, expected each setting once")
        if isinstance(values, Mapping):
            found[key] = _range(key, values, types_of[key])
        elif isinstance(values, list) and values:
            found[key] = Choices(key, tuple(map(text_of, values)))
            if len(set(map(text_of, values))) < len(values):
                raise UserError(f"search.{key} has a value twice, expected different ones")
        else:
            raise UserError(f"search.{key} is {text_of(values)!r}, expected a list or {{low: ..., high: ...}}")
    return list(found.values())


def _range(key: str, given: Mapping[str, Any], hint: Any) -> Range:
    name = f"search.{key}"
    if unknown := sorted(set(given) - set(RANGE)):
        raise UserError(f"{name}.{unknown[0]} is unknown, expected some of {', '.join(RANGE)}")
    bounds = [convert(given.get(end, ""), hint) for end in ("low", "high")]
    for end, value in zip(("low", "high"), bounds):
        if type(value) not in (int, float):
            raise UserError(f"{name}.{end} is {given.get(end)!r}, expected {describe(hint)}, and a number in a range")
    low, high = bounds
    kind = int if type(low) is type(high) is int else float
    step = convert(given["step"], kind) if "step" in given else None
    log = convert(given.get("log", "false"), bool)
    if step is WRONG or (step is not None and step <= 0):
        raise UserError(f"{name}.step is {given['step']!r}, expected {describe(kind)} above 0")
    if log is WRONG or (log and step is not None):
        raise UserError(f"{name}.log is {given['log']!r}, expected true or false, and false with step")
    if not low < high or (log and low <= 0):
        raise UserError(f"{name} is {low} to {high}, expected low below high{', and low above 0 with log' * log}")
    if step is not None and abs((high - low) / step - round((high - low) / step)) > 1e-6:
        raise UserError(f"{name}.high is {high}, expected low plus a multiple of step {step}")
    return Range(key, kind(low), kind(high), step, log)


def grid(found: Sequence[Dimension]) -> Iterator[dict[str, str]]:
    """Yield every combination: setting -> value.

    Raises:
        UserError: a range has no step.
    """
    for values in itertools.product(*(one.points() for one in found)):
        yield dict(zip((one.key for one in found), values))


def corners(found: Sequence[Dimension]) -> Iterator[dict[str, str]]:
    """Yield combinations of the values that must be valid: the first MOST_CORNERS, then each value with the first ones
    of the other settings."""
    keys, ends = [one.key for one in found], [one.ends() for one in found]
    for values in itertools.islice(itertools.product(*ends), MOST_CORNERS):
        yield dict(zip(keys, values))
    first = {key: values[0] for key, values in zip(keys, ends)}
    for key, values in zip(keys, ends):
        yield from ({**first, key: value} for value in values)


def name_of(point: Mapping[str, str]) -> str:
    """Return a name for a combination, which may be that of a folder."""
    parts = (f"{key.rpartition('.')[2]}={value}" for key, value in point.items())
    return ",".join("".join(c if c.isalnum() or c in "._+=-" else "-" for c in part) for part in parts)
