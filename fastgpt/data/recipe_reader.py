"""YAML read into dataclasses by the types of their fields, with the line of every key for the errors."""

from __future__ import annotations

import dataclasses
import json
import re
import types
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from fastgpt.core.errors import UserError
from fastgpt.core.options import NULLS, WRONG, convert, describe, did_you_mean


@dataclass
class Node:
    """A value in YAML with its line: text, None, a list of nodes or a mapping of nodes."""

    value: Any
    line: int

    def plain(self) -> Any:
        """Return the value without its lines."""
        if isinstance(self.value, dict):
            return {k: v.plain() for k, v in self.value.items()}
        return [v.plain() for v in self.value] if isinstance(self.value, list) else self.value


class KeyedError(UserError):
    """An error that belongs to a key of a recipe, found after the recipe was read; `at_line` adds file and line."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(text)
        self.key = key

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.key, str(self))


class Reader:
    """Converts the nodes of one recipe; remembers the line of every key for the checks that follow."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.lines: dict[str, int] = {}

    def fail(self, key: str, text: str) -> NoReturn:
        """Raise UserError with the file and the line of the key, or of the nearest key above it."""
        line = next((n for k in _parents(key) if (n := self.lines.get(k))), 1)
        raise UserError(f"{self.where}, line {line}: {text}")

    def read(self, node: Node, hint: Any, key: str) -> Any:
        """Return the value of a node in the type `hint`. Raises UserError."""
        self.lines[key] = node.line
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        for kind in kinds:
            if is_dataclass(kind) and isinstance(kind, type) and isinstance(node.value, dict):
                return self._fields(node, kind, key)
            if kind is Any and isinstance(node.value, list):
                return [self.read(v, Any, f"{key}[{i}]") for i, v in enumerate(node.value)]
            if kind is Any and isinstance(node.value, dict):
                return {k: self.read(v, Any, f"{key}.{k}" if key else k) for k, v in node.value.items()}
            if get_origin(kind) is dict and isinstance(node.value, dict):
                inner = get_args(kind)[1]
                return {k: self.read(v, inner, f"{key}.{k}" if key else k) for k, v in node.value.items()}
            scalar = node.value is None or isinstance(node.value, str)
            if get_origin(kind) in (list, tuple) and not isinstance(node.value, dict) and not (scalar and str in kinds):
                items = node.value if isinstance(node.value, list) else [node] if node.value is not None else []
                read = [self.read(v, get_args(kind)[0], f"{key}[{i}]") for i, v in enumerate(items)]
                return read if get_origin(kind) is list else tuple(read)
        plain = node.plain()
        found = convert(plain, hint)
        if found is WRONG:
            got = plain if isinstance(plain, str) else json.dumps(plain).replace('"', "")
            self.fail(key, f"{key} is {got!r}, expected {_expected(hint)}")
        return found

    def _fields(self, node: Node, cls: type, key: str) -> Any:
        hints = get_type_hints(cls)
        prefix = f"{key}." if key else ""
        for name, value in node.value.items():
            if name not in hints:
                self.lines[prefix + name] = value.line
                self.fail(prefix + name, f"{prefix}{name} is not a key{did_you_mean(name, hints)}")
        for f in fields(cls):
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            if required and f.name not in node.value:
                self.fail(key, f"{prefix}{f.name} is missing")
        values = {name: self.read(v, hints[name], prefix + name) for name, v in node.value.items()}
        try:
            return cls(**values)
        except ValueError as e:
            self.fail(key, f"{key}: {e}")


def compose(text: str, where: str) -> Node:
    """Return the nodes of a YAML text; `where` names its file. Raises UserError."""
    try:
        import yaml
    except ImportError as e:
        raise UserError("reading a recipe needs PyYAML: pip install PyYAML") from e

    def read(node: Any) -> Node:
        line = node.start_mark.line + 1
        if isinstance(node, yaml.SequenceNode):
            return Node([read(item) for item in node.value], line)
        if not isinstance(node, yaml.MappingNode):
            return Node(None if node.style is None and node.value.lower() in NULLS else node.value, line)
        found: dict[str, Node] = {}
        for key, value in node.value:
            name = str(key.value)
            if name in found:
                raise UserError(f"{where}, line {key.start_mark.line + 1}: {name} is given twice, expected once")
            found[name] = read(value)
            found[name].line = key.start_mark.line + 1
        return Node(found, line)

    try:
        node = yaml.compose(text, yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as e:
        mark = getattr(e, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise UserError(f"{where}, line {line}: not valid YAML ({getattr(e, 'problem', None) or e})") from None
    return Node(None, 1) if node is None else read(node)


def at_line(path: str | Path, error: KeyedError) -> UserError:
    """Return the error with the recipe's file and the line of its key."""
    reader = Reader(str(path))
    reader.read(compose(Path(path).read_text(encoding="utf-8"), str(path)), Any, "")
    try:
        reader.fail(error.key, str(error))
    except UserError as e:
        return e


def _parents(key: str) -> list[str]:
    """Return the key and the keys above it, the nearest first: a.b[0].c, a.b[0], a.b, a, ''."""
    parts = re.findall(r"\.?[^.\[]+|\[\d+\]", key)
    return ["".join(parts[:n]) for n in range(len(parts), -1, -1)]


def _expected(hint: Any) -> str:
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return " or ".join("a mapping" if is_dataclass(k) else describe(k) for k in kinds)
