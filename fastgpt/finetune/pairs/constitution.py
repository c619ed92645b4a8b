"""A constitution: rules by which a model criticises, revises and compares its answers.

    rules:
      - name: honest
        critique: Say where your answer claims more than you know.
        revision: Rewrite your answer so that it says what is not known.
        comparison: Which answer is more honest about what is not known?
        examples:
          - {prompt: ..., answer: ..., critique: ..., revision: ...}

Source: Bai et al., Constitutional AI (arXiv 2212.08073); the examples are shown as earlier turns of the conversation.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from fastgpt.core.errors import UserError, cause_of
from fastgpt.data.recipe_reader import Reader, compose


@dataclass(frozen=True)
class Example:
    """An answer to a prompt, its critique by a rule, and its revision."""

    prompt: str
    answer: str
    critique: str
    revision: str


@dataclass(frozen=True)
class Rule:
    """A rule.

    Attributes:
        name: for records.
        critique, revision: what asks the model to criticise its answer, and to revise it after that.
        comparison: what asks which of two answers is better; empty: the rule is not used to compare.
        examples: shown before the prompt.
    """

    name: str
    critique: str
    revision: str
    comparison: str = ""
    examples: list[Example] = field(default_factory=list)


@dataclass(frozen=True)
class Constitution:
    """Rules, one of which is drawn for each prompt."""

    rules: list[Rule]


def load_constitution(path: str | Path) -> Constitution:
    """Read a YAML file.

    Raises:
        UserError: with file, line and key: it cannot be read, a key is unknown or missing, or has no fitting value.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"constitution: {path} cannot be read ({cause_of(e)}), expected a YAML file") from None
    reader, root = Reader(str(path)), compose(text, str(path))
    if not isinstance(root.value, dict):
        reader.fail("", "the file holds no mapping, expected the key rules with a list of rules")
    found: Constitution = reader.read(root, Constitution, "")
    if not found.rules:
        reader.fail("rules", "rules is empty, expected at least one rule")
    seen: set[str] = set()
    for i, rule in enumerate(found.rules):
        _require_texts(reader, f"rules[{i}]", rule, optional=("comparison", "examples"))
        if rule.name in seen:
            reader.fail(f"rules[{i}].name", f"rules[{i}].name is {rule.name!r} for the second time, expected another")
        seen.add(rule.name)
        for n, example in enumerate(rule.examples):
            _require_texts(reader, f"rules[{i}].examples[{n}]", example)
    return found


def _require_texts(reader: Reader, key: str, of: Rule | Example, optional: tuple[str, ...] = ()) -> None:
    """Refuse a text without words."""
    for f in fields(of):
        value = getattr(of, f.name)
        if f.name not in optional and not value.strip():
            reader.fail(f"{key}.{f.name}", f"{key}.{f.name} is empty, expected text")
