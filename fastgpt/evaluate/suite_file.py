"""Suites of one's own: a YAML file with settings, and items in it or in a JSONL file.

A suite has one kind. The kind says which keys an item needs, what the model does with it, and the figures:

- choice: the most likely of `choices`; acc, and acc_norm by characters
- classification: the most likely of the suite's `labels`; acc, macro_f1
- cloze: `answer` after the prompt; acc (greedy decoding would write it), perplexity
- qa: generates, compares with `answers`; exact_match, f1
- span: the same about a `context`
- perplexity: the probability of `text`; word_perplexity, byte_perplexity, bits_per_byte
- generation: generates, judged by a regular expression, a JSON schema or a model; pass, valid, or judge

The prompt is a template: {key} is replaced by that key of the item. Examples come first, in the order of their pool, as
the LM Evaluation Harness writes them: description, then prompt, delimiter and answer of each, two newlines between.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.core.errors import UserError, cause_of, counted
from fastgpt.data.recipe_reader import KeyedError, Node, Reader, compose
from fastgpt.evaluate.suite_items import Item, item_of, wrong_pattern
from fastgpt.evaluate.suite_schema import check_schema
from fastgpt.evaluate.suite_settings import Settings


@dataclass(frozen=True)
class Problem:
    """Something wrong with an item: the file with the line, and a sentence that shows no contents."""

    place: str
    text: str


@dataclass(frozen=True)
class Suite:
    """A suite as it was read.

    Attributes:
        items: the items without errors.
        pool: examples without errors.
        problems: what is wrong with the others.
    """

    path: Path
    settings: Settings
    items: list[Item]
    pool: list[Item]
    problems: list[Problem]

    def context(self, item: Item) -> str:
        """Return the whole prompt of an item: description, examples, prompt."""
        s = self.settings
        shown = "".join(f"{e.prompt}{s.delimiter}{e.target}\n\n" for e in self.pool[: s.shots])
        return f"{s.description}{shown}{item.prompt}"


def read_suite(path: str | Path) -> Suite:
    """Read a suite. Wrong items are in `problems`.

    Raises:
        UserError: a file cannot be read, or a setting is wrong.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        raise UserError(
            f"suite is {path}, expected a YAML file with settings that names it under `items`; "
            "`fastgpt eval init` writes one"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read the suite {path}: {cause_of(e)}") from None
    node = compose(text, str(path))
    reader = Reader(str(path))
    if not isinstance(node.value, dict):
        reader.fail("", "expected a suite: keys and values such as `suite: NAME`")
    for key in set(node.value) & {"items", "examples"}:
        if not isinstance(node.value[key].value, (str, list)):
            reader.lines[key] = node.value[key].line
            reader.fail(key, f"{key} is not a file, expected a JSONL file or a list of items")
    try:
        settings: Settings = reader.read(node, Settings, "")
    except KeyedError as e:
        reader.lines |= {key: value.line for key, value in node.value.items()}
        reader.fail(e.key, str(e))
    _check_judging(settings, path, reader)
    problems: list[Problem] = []
    items = _read_items("items", node.value["items"], settings, path, problems)
    pool = _read_items("examples", node.value["examples"], settings, path, problems) if settings.examples else []
    if len(pool) < settings.shots and not problems:
        reader.fail("shots", f"shots is {settings.shots}, but the pool of examples has {len(pool)}")
    shown = {example.id: example.place for example in pool[: settings.shots]}
    problems += [Problem(i.place, f"the item is also the example in {shown[i.id]}") for i in items if i.id in shown]
    return Suite(path, settings, items, pool, problems)


def open_suite(path: str | Path) -> Suite:
    """Read a suite without errors.

    Raises:
        UserError: something is wrong with it; the first of several errors, with their number.
    """
    suite = read_suite(path)
    if suite.problems:
        first, more = suite.problems[0], len(suite.problems) - 1
        and_more = f" (and {counted(more, 'more error')}: `fastgpt eval check {path}` lists them)" if more else ""
        raise UserError(f"{first.place}: {first.text}{and_more}")
    if not suite.items:
        raise UserError(f"suite {path} has no items, expected at least one")
    return suite


def _check_judging(settings: Settings, path: Path, reader: Reader) -> None:
    """Compile the pattern of a generation and check its schema."""
    judge = settings.judge
    if settings.kind != "generation":
        return
    if judge.regex is not None and (wrong := wrong_pattern(judge.regex)):
        reader.fail("judge.regex", f"regex is not valid ({wrong})")
    if judge.schema is not None:
        try:
            check_schema(schema_of(settings, path))
        except UserError as e:
            reader.fail("judge.schema", str(e))


def schema_of(settings: Settings, path: Path) -> Any:
    """Return the JSON schema of a suite, which may be in a file. Raises UserError if it cannot be read."""
    schema = settings.judge.schema
    if not isinstance(schema, str):
        return _plain(path)["judge"]["schema"]
    try:
        return json.loads((path.parent / schema).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"schema {schema} cannot be read ({cause_of(e)}), expected a JSON file") from None


def _read_items(key: str, node: Node, settings: Settings, path: Path, problems: list[Problem]) -> list[Item]:
    """Return the items of a list in the suite or of a JSONL file; wrong ones go to `problems`."""
    if isinstance(node.value, list):
        rows = [(f"{path}, line {n.line}", v) for n, v in zip(node.value, _plain(path)[key])]
    else:
        rows = _jsonl(path.parent / node.value, f"{path}, line {node.line}: {key}", problems)
    found = []
    for place, row in rows:
        try:
            found.append(item_of(row, settings, place, key == "examples"))
        except ValueError as e:
            problems.append(Problem(place, str(e)))
    return found


def _plain(path: Path) -> Any:
    """Return the values of a YAML file in their own types, for items and schemas; settings are read as text."""
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, ValueError) as e:  # a tag, or a date that does not exist
        mark = getattr(e, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{at}: not valid YAML ({getattr(e, 'problem', None) or e})") from None


def _jsonl(path: Path, where: str, problems: list[Problem]) -> list[tuple[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{where} is {path}, which cannot be read: {cause_of(e)}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                rows.append((place, json.loads(line)))
            except ValueError as e:
                problems.append(Problem(place, f"not JSON ({e})"))
    return rows
