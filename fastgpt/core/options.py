"""Read the command line and YAML into the fields of a (nested) dataclass; each error is one sentence.

A setting's type decides how its text is read, on the command line and in a file alike: `1:30` is never a number, and
`data: 123` is the text 123. Only null, lists and mappings follow the rules of YAML.
"""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import re
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from fastgpt.core.errors import UserError

log = logging.getLogger("fastgpt")

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
BOOLS = {"true": True, "false": False}
FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|[-+]?\.inf|\.nan", re.IGNORECASE)
NULLS = ("null", "~", "")
WRONG = object()  # what `convert` returns for a value that is not of the type


class Effect(NamedTuple):
    """When a setting has an effect, for one that other settings can disable.

    Attributes:
        here: whether it has one, of the settings.
        where: with which settings it has one.
    """

    here: Callable[[Any], bool]
    where: str


def without_effect(settings: Any, given: Iterable[str], effects: Mapping[str, Effect]) -> Iterator[tuple[str, str]]:
    """Yield each of the dotted keys `given` that has no effect with the other settings, and a clause that says so."""
    for key in given:
        if key in effects and not effects[key].here(settings):
            yield key, f"has no effect here: it only applies with {effects[key].where}"


def names() -> list[str]:
    """Return the names of the configurations included in the package."""
    return sorted(p.name[:-5] for p in (files("fastgpt") / "configs").iterdir() if p.name.endswith(".yaml"))


def path_of(name: str) -> str:
    """Return the path of a configuration given by name or path.

    Raises:
        UserError: there is none.
    """
    if name in names():
        return str(files("fastgpt") / "configs" / f"{name}.yaml")
    if not Path(name).is_file():
        raise UserError(f"config is {name!r}, expected a YAML file or one of {', '.join(names())}")
    return name


def from_command_line(
    cls: type,
    argv: Sequence[str],
    default: str | None,
    usage: str = "fastgpt train [--config NAME_OR_FILE] [--SETTING VALUE] ...",
) -> tuple[dict[str, Any], str, set[str]]:
    """Return the given settings of dataclass `cls` as nested plain values, the last configuration that argv names (else
    `default`, or none and ""), and the keys that argv sets. `--help` prints `usage` and every setting, and exits.

    Configurations are read first, in order, wherever they appear in argv. Options override them, and the last one of
    each key counts.

    Raises:
        UserError: names the key, the value received and the value expected.
    """
    if {"-h", "--help"} & set(argv):
        print(help_text(cls, default, usage))
        raise SystemExit(0)
    types_of = key_types(cls)
    configs, typed = _options(argv, types_of)
    configs = configs or ([default] if default else [])
    flat: dict[str, Any] = {}
    for name in configs:
        flat |= _flat(_read_file(path_of(name), f"config {name}"), types_of, f"config {name}")
    for key, text in typed.items():
        flat |= _flat({key: _parse(key, text, types_of[key])}, types_of, "the command line")
    return _nested(flat), configs[-1] if configs else "", set(typed)


def from_mapping(cls: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check stored settings against dataclass `cls` and return them.

    Raises:
        UserError: unknown keys and wrong types.
    """
    return _nested(_flat(settings, key_types(cls), "the stored settings"))


def from_file(cls: type, path: str | Path) -> dict[str, Any]:
    """Return the settings of dataclass `cls` in a YAML file as nested plain values.

    Raises:
        UserError: the file cannot be read, unknown keys and wrong types; each names the file.
    """
    try:
        return _nested(_flat(_read_file(str(path), str(path)), key_types(cls), str(path)))
    except UserError as e:
        raise e if str(path) in str(e) else UserError(f"{path}: {e}") from None


def key_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> type for every field of a dataclass and of the dataclasses nested in it."""
    found: dict[str, Any] = {}
    hints = get_type_hints(cls)
    for f in fields(cls):
        key, hint = prefix + f.name, hints[f.name]
        found[key] = hint
        if is_dataclass(hint):
            found |= key_types(hint, key + ".")  # type: ignore[arg-type]
    return found


def _options(argv: Sequence[str], types_of: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Return the configurations in argv, and key -> text of its other options.

    A bare flag is true, and false after `no-`. An option given twice with different values is logged.
    """
    configs: list[str] = []
    found: dict[str, str] = {}
    words = list(argv)
    while words:
        option, equals, value = words.pop(0).partition("=")
        key = option[2:].replace("-", "_")
        if not option.startswith("--"):
            raise UserError(unknown(option, types_of))
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        elif not equals and types_of.get(key) is bool:
            value = "true"
        elif not equals and key.startswith("no_") and types_of.get(key[3:]) is bool:
            key, value = key[3:], "false"
        elif not equals and key in (*types_of, "config"):
            raise UserError(f"{key} got no value, expected {describe(types_of.get(key, str))}")
        if key == "config":
            configs.append(value)
            continue
        if key not in types_of:
            raise UserError(unknown(key, types_of))
        if found.get(key, value) != value:
            log.warning("--%s is given twice: using the last value, %s, not %s", key, value, found[key])
        found[key] = value
    return configs, found


def _read_file(path: str, source: str) -> Mapping[str, Any]:
    """Return the mapping in a YAML file, with scalars as text."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except ValueError as e:
        raise UserError(f"{source} is not UTF-8 text ({e})") from e
    settings = _yaml(text, source)
    if not isinstance(settings, dict):
        held = textwrap.shorten(text, 80, placeholder=" ...")
        raise UserError(f"{source} holds {held!r}, expected a mapping of settings")
    return settings


def _yaml(text: str, source: str) -> Any:
    """Parse YAML whose scalars all become text, or None for null. A duplicate key in a mapping is an error."""
    try:
        import yaml  # a machine without network may lack it; only files, lists and mappings need it
    except ImportError as e:
        raise UserError("reading settings in YAML needs PyYAML: pip install PyYAML") from e

    def value(node: Any) -> Any:
        if isinstance(node, yaml.SequenceNode):
            return [value(item) for item in node.value]
        if not isinstance(node, yaml.MappingNode):
            return None if node.style is None and node.value.lower() in NULLS else node.value
        found: dict[str, Any] = {}
        for key_node, item in node.value:
            key = str(key_node.value)
            if key in found:
                raise UserError(f"{source} sets {key} twice, expected each setting once")
            found[key] = value(item)
        return found

    try:
        node = yaml.compose(text, yaml.BaseLoader)
        return None if node is None else value(node)
    except (yaml.YAMLError, RecursionError) as e:
        raise UserError(f"{source} is not valid YAML ({' '.join(str(e).split())})") from e


def _parse(key: str, text: str, hint: Any) -> Any:
    """Parse the text of an option: null, a list or mapping if the type allows one, else the text itself."""
    kinds = (hint, *get_args(hint))
    if type(None) in kinds and text == "null":
        return None
    if text[:1] in ("[", "{") and any(is_dataclass(k) or get_origin(k) in (list, dict) for k in kinds):
        return _yaml(text, key)
    return text


def _flat(settings: Mapping[str, Any], types_of: dict[str, Any], source: str, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> converted value."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if key not in types_of:
            raise UserError(f"{source}: {unknown(key, types_of)}")
        if is_dataclass(types_of[key]) and isinstance(value, Mapping):
            flat |= _flat(value, types_of, source, key + ".")
            continue
        flat[key] = convert(value, types_of[key])
        if flat[key] is WRONG:
            got = value if isinstance(value, str) else json.dumps(value).replace('"', "")
            raise UserError(f"{key} is {got!r}, expected {describe(types_of[key])}")
    return flat


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *groups, name = key.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return nested


def convert(value: Any, hint: Any) -> Any:
    """Convert `value`, text or a plain value, to the type `hint`; return WRONG if it does not fit."""
    inner = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):  # text last: everything typed is text
        found = (convert(value, kind) for kind in sorted(inner, key=lambda kind: kind is str))
        return next((v for v in found if v is not WRONG), WRONG)
    if get_origin(hint) is list and isinstance(value, list):
        items = [convert(v, inner[0]) for v in value]
        return WRONG if any(v is WRONG for v in items) else items
    if get_origin(hint) is dict and isinstance(value, Mapping):
        entries = {k: convert(v, inner[1]) for k, v in value.items()}
        return WRONG if any(v is WRONG for v in entries.values()) else entries
    if get_origin(hint) is Literal:
        return value if isinstance(value, str) and value in inner else WRONG
    return _scalar(value, hint)


def _scalar(value: Any, hint: Any) -> Any:
    """Convert `value` to a number, boolean, text or null; for Any, to the first of these that it looks like."""
    if hint is Any:
        if not isinstance(value, str):
            return value
        return next(v for kind in (int, float, bool, str) if (v := _scalar(value, kind)) is not WRONG)
    if hint is bool and isinstance(value, str):
        value = BOOLS.get(value.lower(), WRONG)
    if hint is int and isinstance(value, str) and re.fullmatch(r"[-+]?\d{1,19}", value):
        value = int(value)
    if hint is float and isinstance(value, str) and FLOAT.fullmatch(value):
        value = float(value.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if hint is float and type(value) is int:
        value = float(value)
    return value if type(value) is hint or (hint is type(None) and value is None) else WRONG


def unknown(key: str, types_of: dict[str, Any]) -> str:
    """Return the error text for a key that does not exist."""
    if key.partition(".")[0] not in types_of:
        key = key.partition(".")[0]
    return f"{key} is not a setting" + (did_you_mean(key, [*types_of, "config"]) or " (--help lists them)")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean ...?)" with the known name nearest to `name`, or "" if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def describe(hint: Any) -> str:
    """Describe a type in words."""
    if hint in WORDS:
        return WORDS[hint]
    if get_origin(hint) is Literal:
        values = list(map(str, get_args(hint)))
        return values[0] if len(values) == 1 else "one of " + ", ".join(values)
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(describe(a) for a in get_args(hint))
    if get_origin(hint) is list:
        return f"a list of ({describe(get_args(hint)[0])})"
    return "a mapping"


def help_text(cls: type, default: str | None, usage: str) -> str:
    """Return the help text: every setting with its type, default and description."""
    more = "Names accept hyphens or underscores. A setting that is true or false needs no value: --name, --no-name."
    known = f"a YAML file, or one of {', '.join(names())}; default {default}" if default else "a YAML file"
    return "\n".join(
        [f"usage: {usage}", "", more, "", _entry("config", known, "settings to start from."), *_help_of(cls)]
    )


def _help_of(cls: type, prefix: str = "") -> Iterator[str]:
    hints, docs = get_type_hints(cls), descriptions(cls)
    for f in fields(cls):
        key, hint = prefix + f.name, hints[f.name]
        default = f.default if f.default_factory is MISSING else f.default_factory()
        shown = default if isinstance(default, str) and default else json.dumps(default, default=lambda _: {})
        is_group = is_dataclass(hint)
        yield _entry(key, describe(hint) + ("" if is_group else f"; default {shown}"), docs[f.name])
        if is_group:
            yield from _help_of(hint, key + ".")  # type: ignore[arg-type]


def _entry(key: str, kind: str, text: str) -> str:
    indent = " " * 8
    described = textwrap.fill(text, 100, initial_indent=indent, subsequent_indent=indent)
    return f"  --{key.replace('_', '-')}  ({kind})\n{described}"


def descriptions(cls: type) -> dict[str, str]:
    """Return field -> its text under 'Attributes:' in the docstring."""
    doc = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", doc, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
