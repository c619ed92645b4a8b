"""A part of JSON Schema, enough for the shape of an answer; a keyword outside it is an error and never ignored.

Keywords: type, enum, const, properties, required, additionalProperties (true or false), items, minItems, maxItems,
minimum, maximum, minLength, maxLength, pattern, anyOf. Source: JSON Schema 2020-12.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.core.options import did_you_mean

TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "number": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    "integer": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and v == int(v),
}
REMARKS = ("$schema", "$id", "title", "description", "examples", "default")  # have no effect on validity
LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "minimum": ("number", lambda v, limit: v >= limit),
    "maximum": ("number", lambda v, limit: v <= limit),
    "minLength": ("string", lambda v, limit: len(v) >= limit),
    "maxLength": ("string", lambda v, limit: len(v) <= limit),
    "minItems": ("array", lambda v, limit: len(v) >= limit),
    "maxItems": ("array", lambda v, limit: len(v) <= limit),
}
OTHERS = ("type", "enum", "const", "properties", "required", "additionalProperties", "items", "pattern", "anyOf")


def check_schema(schema: Any, where: str = "schema") -> None:
    """Raise UserError unless a schema has only keywords of this file, with values of the right type."""
    if not isinstance(schema, dict):
        raise UserError(f"{where} is not a mapping, expected a JSON schema")
    for key, value in schema.items():
        known = (*LIMITS, *OTHERS, *REMARKS)
        if key not in known:
            raise UserError(f"{where} has the keyword {key!r}{did_you_mean(str(key), known)}, which is not supported")
        if not _right(key, value):
            raise UserError(f"{where}.{key} has a value of the wrong type")
    for name, inner in schema.get("properties", {}).items():
        check_schema(inner, f"{where}.properties.{name}")
    if "items" in schema:
        check_schema(schema["items"], f"{where}.items")
    for i, inner in enumerate(schema.get("anyOf", [])):
        check_schema(inner, f"{where}.anyOf[{i}]")


def _right(key: str, value: Any) -> bool:
    """Return whether a keyword may have this value."""
    if key in LIMITS:
        return TYPES["number"](value)
    if key == "type":
        names = value if isinstance(value, list) else [value]
        return bool(names) and all(isinstance(name, str) and name in TYPES for name in names)
    if key == "pattern":
        try:
            re.compile(value)
        except (re.error, TypeError):
            return False
    if key == "required":
        return isinstance(value, list) and all(isinstance(name, str) for name in value)
    kinds = {"properties": dict, "additionalProperties": bool, "enum": list, "anyOf": list, "items": dict}
    return isinstance(value, kinds.get(key, object))


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Return whether a value fits a schema that `check_schema` accepts."""
    names = schema.get("type", [])
    if names and not any(TYPES[name](value) for name in ([names] if isinstance(names, str) else names)):
        return False
    if "const" in schema and not _same(value, schema["const"]):
        return False
    if "enum" in schema and not any(_same(value, v) for v in schema["enum"]):
        return False
    for key, (kind, holds) in LIMITS.items():
        if key in schema and TYPES[kind](value) and not holds(value, schema[key]):
            return False
    if "pattern" in schema and isinstance(value, str) and not re.search(schema["pattern"], value):
        return False
    if "anyOf" in schema and not any(fits(value, inner) for inner in schema["anyOf"]):
        return False
    if isinstance(value, list) and "items" in schema and not all(fits(v, schema["items"]) for v in value):
        return False
    return not isinstance(value, dict) or _object_fits(value, schema)


def _object_fits(value: dict[str, Any], schema: dict[str, Any]) -> bool:
    properties = schema.get("properties", {})
    if not set(schema.get("required", [])) <= set(value):
        return False
    if schema.get("additionalProperties", True) is False and not set(value) <= set(properties):
        return False
    return all(fits(v, properties[k]) for k, v in value.items() if k in properties)


def _same(a: Any, b: Any) -> bool:
    """Return whether two JSON values are equal; true is not 1."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True) or (
        TYPES["number"](a) and TYPES["number"](b) and a == b
    )


def text_fits(text: str, schema: dict[str, Any]) -> bool:
    """Return whether a text is one JSON value that fits a schema; a fence of Markdown around it is left out."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n?```\s*", text, re.S)
    try:
        return fits(json.loads(fenced[1] if fenced else text), schema)
    except (ValueError, RecursionError):
        return False
