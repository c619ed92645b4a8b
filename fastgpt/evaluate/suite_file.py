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

import hashlib
import json
import re
import string
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from fastgpt.core.errors import UserError, cause_of, counted
from fastgpt.core.options import did_you_mean
from fastgpt.data.recipe_reader import KeyedError, Node, Reader, compose
from fastgpt.evaluate.judge import JudgeSettings
from fastgpt.evaluate.suite_schema import check_schema

Kind = Literal["choice", "classification", "cloze", "qa", "span", "perplexity", "generation"]
KINDS = get_args(Kind)
PROMPTS = {
    "choice": "{question}",
    "classification": "{text}\nLabel:",
    "cloze": "{text}",
    "qa": "Question: {question}\nAnswer:",
    "span": "{context}\nQuestion: {question}\nAnswer:",
    "perplexity": "",
    "generation": "{prompt}",
}
GENERATES = ("qa", "span", "generation")
ONE_KIND = {  # settings that only some kinds have
    "labels": ("classification",),
    "max_new_tokens": GENERATES,
    "stop": GENERATES,
    "tokenizer": ("qa", "span"),
    "normalize": ("qa", "span"),
    "judge": ("generation",),
    **dict.fromkeys(
        ("prompt", "delimiter", "description", "examples", "shots"), tuple(k for k in KINDS if k != "perplexity")
    ),
}


@dataclass(frozen=True)
class Judging:
    """How generated texts are judged: exactly one of regex, schema and model. An item may have its own `regex`.

    Attributes:
        regex: regular expression that a right text contains.
        full: the whole text must match it.
        schema: a JSON schema, or the file of one; a right text is JSON that fits.
        model: a model that judges, behind an OpenAI-compatible server.
    """

    regex: str | None = None
    full: bool = False
    schema: Any = None
    model: JudgeSettings | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("regex", "schema", "model") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"got {' and '.join(given)}, expected one of regex, schema and model")
        if self.full and given and given != ["regex"]:
            raise ValueError("full has no effect without a regex")


@dataclass(frozen=True)
class Settings:
    """Settings of a suite.

    Attributes:
        suite: its name.
        kind: what an item is.
        items: JSONL file, relative to the YAML file, or the items.
        examples: pool of examples for the prompt, as `items`.
        shots: examples in each prompt.
        description: text before everything.
        prompt: template of the prompt; empty for that of the kind.
        delimiter: between prompt and answer; empty for languages without spaces.
        labels: of a classification.
        max_new_tokens: largest number of tokens of an answer.
        stop: texts that end an answer.
        tokenizer: words of F1: default, unicode or char.
        normalize: compare without case, punctuation and English articles.
        judge: of generated texts.
    """

    suite: str
    kind: Kind
    items: Any
    examples: Any = None
    shots: int = 0
    description: str = ""
    prompt: str = ""
    delimiter: str = " "
    labels: tuple[str, ...] = ()
    max_new_tokens: int = 32
    stop: tuple[str, ...] = ("\n",)
    tokenizer: Literal["default", "unicode", "char"] = "default"
    normalize: bool = True
    judge: Judging = field(default_factory=Judging)

    def __post_init__(self) -> None:
        for f in fields(self):
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            if self.kind not in ONE_KIND.get(f.name, KINDS) and getattr(self, f.name) != default:
                raise KeyedError(f.name, f"{f.name} has no effect in a suite of kind {self.kind}")
        if not re.fullmatch(r"[\w.-]+", self.suite):
            raise KeyedError("suite", f"suite is {self.suite!r}, expected a name of letters, digits, _, - and .")
        for name, least in (("shots", 0), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                raise KeyedError(name, f"{name} is {getattr(self, name)}, expected {least} or more")
        if self.shots and self.examples is None:
            raise KeyedError("shots", f"shots is {self.shots}, expected a pool of examples (key examples)")
        if self.examples is not None and not self.shots:
            raise KeyedError("examples", "examples has no effect, because shots is 0")
        if self.kind == "classification" and len(self.labels) < 2:
            raise KeyedError("labels", f"labels has {len(self.labels)}, expected at least two")
        if len(set(self.labels)) < len(self.labels) or not all(label.strip() for label in self.labels):
            raise KeyedError("labels", "labels has an empty or repeated one, expected different texts")


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


def is_suite(path: str | Path) -> bool:
    """Return whether a file is YAML with the key `suite`."""
    try:
        node = compose(Path(path).read_text(encoding="utf-8"), str(path))
    except (OSError, ValueError, UserError):
        return False
    return isinstance(node.value, dict) and "suite" in node.value


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
            reader.fail(key, f"{key} is no file, expected a JSONL file or a list of items")
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
    problems += [
        Problem(e.place, "the example has no reference, which it shows as its answer")
        for e in pool[: settings.shots]
        if not e.target
    ]
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
    if judge.regex is not None and (wrong := _wrong_pattern(judge.regex)):
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
        return _plain(path)["judge"]["schema"]  # in its own types: settings are read as text
    try:
        return json.loads((path.parent / schema).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"schema {schema} cannot be read ({cause_of(e)}), expected a JSON file") from None


def _wrong_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as e:
        return str(e)
    return ""


def _read_items(key: str, node: Node, settings: Settings, path: Path, problems: list[Problem]) -> list[Item]:
    """Return the items of a list in the suite or of a JSONL file; wrong ones go to `problems`."""
    if isinstance(node.value, list):
        rows = [(f"{path}, line {n.line}", v) for n, v in zip(node.value, _plain(path)[key])]
    else:
        rows = _jsonl(path.parent / node.value, f"{path}, line {node.line}: {key}", problems)
    found = []
    for place, row in rows:
        try:
            found.append(_item(row, settings, place))
        except ValueError as e:
            problems.append(Problem(place, str(e)))
    return found


def _plain(path: Path) -> Any:
    """Return the values of a YAML file in their own types, for the items."""
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8-sig"))


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


def _item(row: Any, s: Settings, place: str) -> Item:
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
    return _generation(row, s, Item(id, place, prompt))


def _generation(row: dict[str, Any], s: Settings, item: Item) -> Item:
    """Return the item of a generation with its pattern and its reference."""
    pattern = _text(row, "regex") if "regex" in row else (s.judge.regex or "")
    if "regex" in row and (s.judge.schema is not None or s.judge.model is not None):
        raise ValueError("regex has no effect, because the suite's judge is a schema or a model")
    if not pattern and s.judge.schema is None and s.judge.model is None:
        raise ValueError("regex is missing, and the suite has no judge (key judge)")
    if wrong := _wrong_pattern(pattern):
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
