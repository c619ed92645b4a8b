"""Settings of the cleaning rules: presets, and rules made from a recipe's values."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastgpt.core.errors import UserError
from fastgpt.data.clean.bias import Bias, Counterfactual, Scorer
from fastgpt.data.clean.classifier import Quality
from fastgpt.data.clean.gopher import GopherQuality, GopherRepetition
from fastgpt.data.clean.language import Language
from fastgpt.data.clean.normalise import Boilerplate, Html, Lowercase, Mojibake, Punctuation, Unicode, Whitespace
from fastgpt.data.clean.personal import PersonalData
from fastgpt.data.clean.spam import Profanity, Spam
from fastgpt.data.clean.step import Step
from fastgpt.data.clean.web import C4, FineWeb

# In the order in which a text passes through them.
STEPS: dict[str, type[Step]] = {
    step.name: step
    for step in (
        *(Unicode, Mojibake, Whitespace, Punctuation, Html, Boilerplate),
        *(Language, GopherRepetition, GopherQuality, C4, FineWeb, Spam, Profanity, Bias, Scorer, Quality),
        *(PersonalData, Lowercase, Counterfactual),
    )
}
FILES = ("words", "groups", "toxic", "pairs", "path")  # settings that name a file
_AS_FINEWEB = {"filter_no_terminal_punct": False}
_LAYOUT = {"collapse": False, "max_blank_lines": 2}
PRESETS: dict[str, dict[str, Any]] = {
    "web": {
        "unicode": True,
        "mojibake": True,
        "whitespace": True,
        "html": True,
        "boilerplate": True,
        "language": True,
        "gopher_repetition": True,
        "gopher_quality": True,
        "c4": _AS_FINEWEB,
        "fineweb": True,
        "spam": True,
        "profanity": True,
        "personal_data": True,
    },
    "prose": {
        "unicode": True,
        "mojibake": True,
        "whitespace": {"collapse": False},
        "gopher_repetition": True,
        "gopher_quality": {"max_doc_words": None, "min_alpha_words_ratio": 0.7, "max_ellipsis_lines_ratio": None},
        "personal_data": True,
    },
    "docs": {
        "unicode": True,
        "mojibake": True,
        "whitespace": _LAYOUT,
        "personal_data": True,
    },
    "code": {
        "unicode": False,
        "whitespace": {"collapse": False, "controls": False, "trailing": False, "max_blank_lines": None},
        "personal_data": {"phone": False, "card": False},
    },
    "none": {},
}


class SettingError(UserError):
    """A wrong setting.

    Attributes:
        path: keys from the outermost to the wrong one, below the section of the cleaning rules.
    """

    def __init__(self, message: str, path: tuple[str, ...]) -> None:
        super().__init__(message)
        self.path = path


def _nearest(key: object, known: Iterable[str], path: tuple[str, ...]) -> SettingError:
    """Return the error for an unknown key."""
    names = list(known)
    close = difflib.get_close_matches(str(key), names, n=1, cutoff=0)
    where = ".".join(("clean", *path))
    return SettingError(f"{where}: unknown setting {key!r}, the nearest known one is {close[0]!r}", (*path, str(key)))


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value has a declared type; a whole number is a number too."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):
        return any(_fits(value, k) for k in args)
    if origin is Literal:
        return value in args
    if origin is list:
        return isinstance(value, list) and all(_fits(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, kind)


def _spell(kind: Any) -> str:
    """Return a type in words for an error."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):
        return " or ".join(_spell(k) for k in args)
    if origin is Literal:
        return " or ".join(repr(value) for value in args)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    if origin is list:
        return f"a list ({_spell(args[0])} each)"
    return "a mapping of whole numbers to numbers" if origin is dict else names.get(kind, str(kind))


def make(name: str, values: Mapping[str, Any]) -> Step:
    """Return a rule with its settings checked."""
    kind = STEPS[name]
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for key, value in values.items():
        if key not in known:
            raise _nearest(key, known, (name,)) if known else SettingError(f"clean.{name} has no settings", (name,))
        if not _fits(value, hints[key]):
            expected = _spell(hints[key])
            raise SettingError(f"clean.{name}.{key} is {value!r}, expected {expected}", (name, key))
        if isinstance(value, (int, float)) and value < 0:
            raise SettingError(f"clean.{name}.{key} is {value!r}, expected 0 or more", (name, key))
    try:
        return kind(**values)
    except SettingError:
        raise
    except UserError as e:
        raise SettingError(f"clean.{name}: {e}", (name,)) from None


def located(settings: Mapping[str, Any] | str, folder: Path) -> dict[str, Any] | str:
    """Return settings in which the files that rules name are below `folder`, unless their paths are absolute."""
    if isinstance(settings, str):
        return settings
    return {
        rule: {key: _locate(key, value, folder) for key, value in values.items()}
        if isinstance(values, Mapping)
        else values
        for rule, values in settings.items()
    }


def _locate(key: str, value: Any, folder: Path) -> Any:
    names_file = key in FILES and isinstance(value, str) and value not in ("built-in", "")
    return str(folder / Path(value).expanduser()) if names_file else value


def contents(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the sha256 of each file that the settings name, and of the module of a scorer, by path."""
    paths = {v for values in settings.values() for k, v in values.items() if k in FILES and v not in ("built-in", "")}
    if "scorer" in settings:
        module = str(settings["scorer"].get("function", "")).partition(":")[0]
        spec = importlib.util.find_spec(module) if module else None
        paths |= {spec.origin} if spec and spec.origin and spec.has_location else set()
    return {str(path): hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in sorted(paths)}


def resolve(settings: Mapping[str, Any] | str) -> dict[str, dict[str, Any]]:
    """Return the settings of each rule that is on, in the order of the rules.

    Args:
        settings: name of a preset, or a mapping with the key "preset" (default: none) and a key for each rule to
        change:
            true, false, or a mapping of its settings, which are added to those of the preset.

    Raises:
        SettingError: an unknown preset, rule or setting, or a value of the wrong type.
    """
    if isinstance(settings, str):
        settings = {"preset": settings}
    preset = settings.get("preset", "none")
    if preset not in PRESETS:
        raise SettingError(f"clean.preset is {preset!r}, expected one of {', '.join(PRESETS)}", ("preset",))
    merged: dict[str, Any] = dict(PRESETS[preset])
    for key, value in settings.items():
        if key == "preset":
            continue
        if key not in STEPS:
            raise _nearest(key, ["preset", *STEPS], ())
        if value is not None and not isinstance(value, (bool, Mapping)):
            raise SettingError(f"clean.{key} is {value!r}, expected true, false or its settings", (key,))
        base = merged.get(key)
        merged[key] = {**base, **value} if isinstance(value, Mapping) and isinstance(base, Mapping) else value
        if value is True and isinstance(base, Mapping):
            merged[key] = base
    on = {name: merged[name] for name in STEPS if merged.get(name) not in (None, False)}
    return {name: {} if value is True else dict(value) for name, value in on.items()}
