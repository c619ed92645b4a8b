"""Command line and YAML into the fields of a (nested) dataclass: jsonargparse, with its errors as one sentence each."""

from __future__ import annotations

import difflib
import functools
import logging
import re
import types
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastgpt.core.errors import UserError

log = logging.getLogger("fastgpt")

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def names() -> list[str]:
    """The configurations that come with the package."""
    return sorted(p.name[:-5] for p in (files("fastgpt") / "configs").iterdir() if p.name.endswith(".yaml"))


def path_of(name: str) -> str:
    """Path of a configuration given by name or path.

    Raises:
        UserError: there is none.
    """
    if name in names():
        return str(files("fastgpt") / "configs" / f"{name}.yaml")
    if not Path(name).is_file():
        raise UserError(f"config is {name!r}, expected a YAML file or one of {', '.join(names())}")
    return name


def from_command_line(cls: type, argv: Sequence[str], default: str) -> tuple[dict[str, Any], str, set[str]]:
    """The settings of dataclass `cls` as plain values, the last configuration that argv names (else `default`), and the
    keys that argv gives a value.

    Configurations are read first, in their order, wherever they stand; then options count, the last one of each key.

    Raises:
        UserError: naming the key, what came and what was expected.
    """
    types_of = key_types(cls)
    args, configs = _normalise(argv, types_of)
    configs = configs or [default]
    words = [*(f"--config={path_of(name)}" for name in configs), *args]
    typed = _typed(args, types_of)
    return _parse(cls, lambda parser: parser.parse_args(words), f"config {configs[-1]}"), configs[-1], set(typed)


def from_mapping(cls: type, settings: dict[str, Any]) -> dict[str, Any]:
    """Stored settings, checked against dataclass `cls`; absent keys take their defaults.

    Raises:
        UserError: unknown keys and wrong types.
    """
    return _parse(cls, lambda parser: parser.parse_object(settings), "the stored settings")


def key_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> type, for every field of a dataclass and of those in it."""
    found: dict[str, Any] = {}
    hints = get_type_hints(cls)
    for f in fields(cls):
        key, hint = prefix + f.name, hints[f.name]
        found[key] = hint
        if is_dataclass(hint):
            found |= key_types(hint, key + ".")  # type: ignore[arg-type]
    return found


def _normalise(argv: Sequence[str], types_of: dict[str, Any]) -> tuple[list[str], list[str]]:
    """argv without its configurations, with underscores in option names, and bare flags as `=true` (`=false` with no_
    before them); and the configurations."""
    args: list[str] = []
    configs: list[str] = []
    words = iter(range(len(argv)))
    for i in words:
        option, equals, value = argv[i].partition("=")
        if option == "--config" and not equals:
            if i + 1 == len(argv):
                raise UserError("config came without a value, expected text")
            configs.append(argv[next(words)])
        elif option == "--config":
            configs.append(value)
        elif option.startswith("--"):
            option = option[:2] + option[2:].replace("-", "_")
            alone = not equals and (i + 1 == len(argv) or argv[i + 1].startswith("--"))
            if alone and option.startswith("--no_") and types_of.get(option[5:]) is bool:
                option, alone, equals, value = "--" + option[5:], False, "=", "false"
            args.append(option + ("=true" if alone and types_of.get(option[2:]) is bool else equals + value))
        else:
            args.append(argv[i])
    return args, configs


def _typed(args: Sequence[str], types_of: dict[str, Any]) -> dict[str, str]:
    """Key -> value of the options in `args` (_normalise's). An option that comes twice with other values is said.

    Raises:
        UserError: a number with colons, which YAML takes for one to the base of 60, or with more digits than any float.
    """
    found: dict[str, str] = {}
    for i, word in enumerate(args):
        if not word.startswith("--"):
            continue
        key, equals, value = word[2:].partition("=")
        value = value if equals or i + 1 == len(args) else args[i + 1]
        hint = types_of.get(key)
        if {int, float} & {hint, *get_args(hint)} and re.fullmatch(r"[-+]?(\d+(:\d+)+(\.\d*)?|\d{20,})", value):
            raise UserError(f"{key} is {value!r}, expected {describe(hint)}")
        if found.get(key, value) != value:
            log.warning("--%s is given twice: the last value counts, %s, not %s", key, value, found[key])
        found[key] = value
    return found


@functools.cache  # building one takes longer than parsing with it
def _parser(cls: type) -> Any:
    from jsonargparse import ActionConfigFile, ArgumentParser  # slow to import, and only who reads settings needs it

    parser = ArgumentParser(prog="fastgpt train", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help=f"YAML file, or one of {', '.join(names())}")
    parser.add_class_arguments(cls, None)
    return parser


def _parse(cls: type, run: Callable[[Any], Any], source: str) -> dict[str, Any]:
    parser = _parser(cls)
    try:
        settings: dict[str, Any] = run(parser).as_dict()
    except (ArgumentError, TypeError, KeyError, ValueError, OverflowError, OSError) as e:
        raise UserError(sentence(str(e), source, key_types(cls))) from e
    settings.pop("config", None)
    return settings


def sentence(message: str, source: str, types_of: dict[str, Any]) -> str:
    """One sentence from jsonargparse's message."""
    text = " ".join(message.split())
    if found := re.search(r'Parser key "([\w.]+)".* (?:(?:Got|Given) value: ?|Unable to load config )(.*)', text):
        came = found[2].strip("\"'")
        came = "null" if came == "None" else came
        return f"{found[1]} is {came!r}, expected {describe(types_of.get(found[1], str))}"
    if found := re.search(r"unrecognized arguments: (?:--)?([^ =]+)", text):
        return unknown(found[1], types_of)
    if found := re.search(r"Option '(.*)' is not accepted", text):
        return f"{source}: {unknown(found[1], types_of)}"
    if found := re.search(r"Group '(.*)' does not accept option '(.*)'", text):
        return f"{source}: {unknown(found[1] + '.' + found[2], types_of)}"
    if found := re.search(r"argument --([\w.]+): expected one argument", text):
        return f"{found[1]} came without a value, expected {describe(types_of.get(found[1], str))}"
    if "Problems parsing config" in text:
        return f"{source} is not valid YAML ({text.partition(': ')[2]})"
    if "Unexpected config" in text:
        return f"{source} holds {text.partition(': ')[2]!r}, expected a mapping of settings"
    return f"{source}: {text}"


def unknown(key: str, types_of: dict[str, Any]) -> str:
    """What to say of a key that does not exist."""
    if key.partition(".")[0] not in types_of:
        key = key.partition(".")[0]
    near = difflib.get_close_matches(key, [*types_of, "config"], n=1)
    return f"{key} is not a setting" + (f" (did you mean {near[0]}?)" if near else " (--help lists them)")


def describe(hint: Any) -> str:
    """A type in words."""
    if hint in WORDS:
        return WORDS[hint]
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(describe(a) for a in get_args(hint))
    if get_origin(hint) is list:
        return f"a list of ({describe(get_args(hint)[0])})"
    return "a mapping"
