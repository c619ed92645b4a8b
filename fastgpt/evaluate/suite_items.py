"""Items of a suite, checked and rendered. Errors name keys and never show contents."""

from __future__ import annotations

import hashlib
import json
import re
import string
from dataclasses import dataclass
from typing import Any

from fastgpt.core.options import did_you_mean
from fastgpt.evaluate.suite_settings import PROMPTS, Settings


@dataclass(frozen=True)
class Item:
    """An item of a suite.

    Attributes:
        id: 16 hex digits, from its contents alone.
        place: file and line.
        prompt: the template with the item's values; of kind perplexity the text.
        choices: texts to choose from (choice, classification).
        gold: number of the right one.
        answers: right answers (cloze, qa, span); the reference of a generation, if there is one.
        regex: pattern of a right text (generation).
    """

    id: str
    place: str
    prompt: str
    choices: tuple[str, ...] = ()
    gold: int = 0
    answers: tuple[str, ...] = ()
    regex: str = ""

    @property
    def target(self) -> str:
        """The answer that an example shows; empty if there is none."""
        return self.choices[self.gold] if self.choices else (self.answers[0] if self.answers else "")


def item_of(row: Any, s: Settings, place: str, example: bool = False) -> Item:
    """Check a row and return the item. Raises ValueError that names the key and shows no contents."""
    if not isinstance(row, dict):
        raise ValueError(f"the item is {_kind_of(row)}, expected keys and values")
    identity = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    id = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    if s.kind == "perplexity":
        return Item(id, place, _text(row, "text"))
    prompt = _fill(s.prompt or PROMPTS[s.kind], row)
    if prompt and not prompt.strip():
        raise ValueError("the prompt is white space alone, expected a text")
    if s.kind == "choice":
        choices = _texts(row, "choices", "at least two texts")
        if len(choices) < 2:
            raise ValueError("choices has one text, expected at least two")
        return Item(id, place, prompt, choices, _gold(row, choices))
    if s.kind == "classification":
        label = _text(row, "label")
        if label not in s.labels:
            raise ValueError(f"label is none of the suite's labels{did_you_mean(label, s.labels)}")
        return Item(id, place, prompt, s.labels, s.labels.index(label))
    if s.kind == "cloze":
        return Item(id, place, prompt, answers=(_text(row, "answer"),))
    if s.kind in ("qa", "span"):
        key = "answers" if "answers" in row else "answer"
        return Item(id, place, prompt, answers=_texts(row, key, "a text or several"))
    if example:
        return Item(id, place, prompt, answers=(_text(row, "reference"),))
    return _generation(row, s, Item(id, place, prompt))


def _generation(row: dict[str, Any], s: Settings, item: Item) -> Item:
    """Return the item of a generation with its pattern and its reference."""
    pattern = _text(row, "regex") if "regex" in row else (s.judge.regex or "")
    if "regex" in row and (s.judge.schema is not None or s.judge.model is not None):
        raise ValueError("regex has no effect, because the suite's judge is a schema or a model")
    if not pattern and s.judge.schema is None and s.judge.model is None:
        raise ValueError("regex is missing, and the suite has no judge (key judge)")
    if wrong := wrong_pattern(pattern):
        raise ValueError(f"regex is not valid ({wrong})")
    reference = (_text(row, "reference"),) if "reference" in row else ()
    if not reference and s.judge.model is not None and s.judge.model.style == "versus":
        raise ValueError("reference is missing, which a judge of style versus compares with")
    return Item(item.id, item.place, item.prompt, answers=reference, regex=pattern)


def _gold(row: dict[str, Any], choices: tuple[str, ...]) -> int:
    """Return the number of the right choice, which `answer` gives as a number from 0 on or as text."""
    if "answer" not in row:
        raise ValueError("answer is missing")
    answer = row["answer"]
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(choices):
            raise ValueError(f"answer is {answer}, expected a choice from 0 to {len(choices) - 1}")
        return answer
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    raise ValueError("answer is none of the choices, expected the text of one or its number from 0 on")


def _fill(template: str, row: dict[str, Any]) -> str:
    parts = []
    for text, name, form, conversion in string.Formatter().parse(template):
        parts.append(text)
        if name is not None:
            if form or conversion or not name:
                raise ValueError("prompt has a brace that names no key, expected {key}, or {{ and }} for braces")
            if name not in row:
                raise ValueError(f"key {name} is missing, which the prompt uses{did_you_mean(name, row)}")
            value = row[name]
            if isinstance(value, (dict, list)) or value is None:
                raise ValueError(f"{name} is {_kind_of(value)}, expected a text")
            parts.append(str(value))
    return "".join(parts)


def _text(row: dict[str, Any], key: str) -> str:
    if key not in row:
        raise ValueError(f"{key} is missing{did_you_mean(key, row)}")
    if not isinstance(row[key], str) or not row[key].strip():
        raise ValueError(f"{key} is {_kind_of(row[key])}, expected a text")
    return str(row[key])


def _texts(row: dict[str, Any], key: str, expected: str) -> tuple[str, ...]:
    if key not in row:
        raise ValueError(f"{key} is missing{did_you_mean(key, row)}")
    values = [row[key]] if isinstance(row[key], str) else row[key]
    if not isinstance(values, list) or not values:
        raise ValueError(f"{key} is {_kind_of(row[key])}, expected {expected}")
    for i, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{key}[{i}] is {_kind_of(value)}, expected a text")
    return tuple(values)


def _kind_of(value: Any) -> str:
    """Describe a value without showing it."""
    if isinstance(value, str):
        return "an empty text" if not value.strip() else "a text"
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "a mapping"}
    return names.get(type(value), "null" if value is None else f"of type {type(value).__name__}")


def wrong_pattern(pattern: str) -> str:
    """Return what is wrong with a regular expression; empty if nothing is."""
    try:
        re.compile(pattern)
    except re.error as e:
        return str(e)
    return ""
