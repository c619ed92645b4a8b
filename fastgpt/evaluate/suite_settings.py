"""Settings of a suite: its kind, its prompt, and how generated texts are judged."""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_args

from fastgpt.data.recipe_reader import KeyedError
from fastgpt.evaluate.judge import JudgeSettings

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
    "chat": GENERATES,
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
        chat: send the prompt as the message of a user, in the model's chat template.
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
    chat: bool = False
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
