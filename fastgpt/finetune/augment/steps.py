"""The setting `augment`: a list of steps, each a mapping with `swap`, `paraphrase` or `hook`."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from fastgpt.core.errors import UserError
from fastgpt.core.options import WRONG, convert, describe, did_you_mean

KINDS = ("swap", "paraphrase", "hook")
INSTRUCTION = (
    "Reword the following text. Keep its meaning, its names and its numbers, and do not answer it. "
    "Write the reworded text alone."
)


@dataclass(frozen=True)
class Step:
    """One way to make rows.

    Attributes:
        name: marks what it makes; default its kind.
        swap: file of terms to swap.
        paraphrase: what rewords prompts: a run, a checkpoint or the folder of a model; with endpoint its name there.
        hook: FILE.py:FUNCTION, which makes rows from a row.
        share: of the training rows that can be changed, drawn by the seed of the run.
        endpoint, key_env: as for make-pairs.
        instruction: what asks for a paraphrase, before the text.
        max_tokens, temperature: of a paraphrase.
        shortest, longest: bounds of its length, as multiples of the length of the text.
        at_once: texts, or requests, at the same time.
    """

    name: str = ""
    swap: str = ""
    paraphrase: str = ""
    hook: str = ""
    share: float = 1.0
    endpoint: str = ""
    key_env: str = ""
    instruction: str = INSTRUCTION
    max_tokens: int = 256
    temperature: float = 0.7
    shortest: float = 0.5
    longest: float = 2.0
    at_once: int = 8

    @property
    def kind(self) -> str:
        """Which of KINDS it is."""
        return next(kind for kind in KINDS if getattr(self, kind))

    @property
    def about(self) -> str:
        """The step for messages: its name, and how it makes rows."""
        return f"augment {self.name} ({self.kind} {getattr(self, self.kind)})"


COMMON = {"name", "share"}


def steps_of(augment: Sequence[Mapping[str, Any]]) -> list[Step]:
    """Return the steps of a setting.

    Raises:
        UserError: names the step and the key.
    """
    steps = [_step(i, given) for i, given in enumerate(augment)]
    names = [step.name for step in steps]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(f"augment[{i}].name is {name!r} for the second time, expected another name")
    return steps


def _step(i: int, given: Mapping[str, Any]) -> Step:
    where, hints = f"augment[{i}]", get_type_hints(Step)
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in hints:
            raise UserError(f"{where}.{key} is not a key{did_you_mean(key, hints)}")
        values[key] = convert(value, hints[key])
        if values[key] is WRONG:
            raise UserError(f"{where}.{key} is {json.dumps(value)}, expected {describe(hints[key])}")
    kinds = [kind for kind in KINDS if values.get(kind)]
    if len(kinds) != 1:
        got = " and ".join(kinds) or "neither"
        raise UserError(f"{where} has {got}, expected one of swap, paraphrase and hook")
    useful = set(hints) - set(KINDS) | set(kinds) if kinds == ["paraphrase"] else COMMON | set(kinds)
    if idle := sorted(set(values) - useful):
        raise UserError(f"{where}.{idle[0]} has no effect here: it only applies with paraphrase")
    step = Step(**{"name": kinds[0], **values})
    _check(where, step)
    return step


def _check(where: str, step: Step) -> None:
    right = {
        "name": (re.fullmatch(r"[\w-]+", step.name) is not None, "letters, digits, _ and -"),
        "share": (0 < step.share <= 1, "more than 0, at most 1"),
        "key_env": (not step.key_env or bool(step.endpoint), "none, or an endpoint"),
        "instruction": (bool(step.instruction.strip()), "text"),
        "max_tokens": (step.max_tokens >= 1, "1 or more"),
        "temperature": (0 <= step.temperature < math.inf, "0 or more"),
        "shortest": (0 <= step.shortest <= 1, "0 to 1"),
        "longest": (1 <= step.longest < math.inf, "1 or more"),
        "at_once": (step.at_once >= 1, "1 or more"),
    }
    for f in dataclasses.fields(Step):
        ok, expected = right.get(f.name, (True, ""))
        if not ok:
            raise UserError(f"{where}.{f.name} is {getattr(step, f.name)!r}, expected {expected}")
