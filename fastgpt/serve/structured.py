"""Structured output: the fields with which clients ask for it, as grammars, and their check before a request waits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fastgpt.core.errors import UserError
from fastgpt.data import Tokenizer
from fastgpt.inference import Grammar, Request
from fastgpt.inference.matcher import Grammars
from fastgpt.serve.errors import ApiError
from fastgpt.serve.strict import Strict

Schema = dict[str, Any] | bool
Name = Annotated[str, Field(min_length=1, max_length=64)]


def json_grammar(schema: Any) -> Grammar:
    """Return the grammar of a JSON schema.

    Raises:
        ValueError: it is too large or too deep.
    """
    try:
        return Grammar("json_schema", json.dumps(schema, ensure_ascii=False))
    except RecursionError:
        raise ValueError("the schema is too deep, expected at most a hundred levels") from None


class Text(Strict):
    type: Literal["text"]


class JsonObject(Strict):
    type: Literal["json_object"]


class Description(Strict):
    """A schema as chat names it; `strict` is accepted, because every schema is followed exactly."""

    name: Name
    description: str | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None


class JsonSchema(Strict):
    type: Literal["json_schema"]
    json_schema: Description


class FlatSchema(Description):
    """The same in the form of the Responses API."""

    type: Literal["json_schema"]


class NamelessSchema(Strict):
    """The same in the form of the Messages API."""

    type: Literal["json_schema"]
    schema_: Schema = Field(alias="schema")


ChatFormat = Annotated[Text | JsonObject | JsonSchema, Field(discriminator="type")]
FlatFormat = Annotated[Text | JsonObject | FlatSchema, Field(discriminator="type")]


class StructuredOutputs(Strict):
    """vLLM's parameter: one of its fields."""

    json_: Schema | str | None = Field(None, alias="json")
    json_object: Literal[True] | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=1000)] | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _has_one(self) -> StructuredOutputs:
        given = [value for value in self.__dict__.values() if value is not None]
        if len(given) != 1:
            raise ValueError(f"has {len(given)} fields, expected one of json, json_object, regex, choice and grammar")
        return self

    def as_grammar(self) -> Grammar:
        """Return the grammar. Raises ValueError if it is too large."""
        if self.json_ is not None:
            return Grammar("json_schema", self.json_) if isinstance(self.json_, str) else json_grammar(self.json_)
        if self.choice is not None:
            return Grammar.of_choices(self.choice)
        if self.json_object:
            return Grammar("json_object")
        return Grammar("lark", self.grammar) if self.grammar is not None else Grammar("regex", self.regex or "")


def as_chat_format(format: FlatFormat) -> dict[str, Any]:
    """Return a format of the Responses API in the form that chat has."""
    values = format.model_dump(by_alias=True, exclude_unset=True)
    kind = values.pop("type")
    return {"type": kind, "json_schema": values} if isinstance(format, FlatSchema) else {"type": kind}


def grammar_of(format: ChatFormat | None, outputs: StructuredOutputs | None) -> Grammar | None:
    """Return the grammar that a body asks for, if any.

    Raises:
        ApiError: two are asked for, or one is too large.
    """
    if isinstance(format, Text):
        format = None
    if format is not None and outputs is not None:
        raise ApiError(400, "response_format and structured_outputs are both given, expected one of them")
    try:
        if outputs is not None:
            return outputs.as_grammar()
        if format is None:
            return None
        if isinstance(format, JsonObject):
            return Grammar("json_object")
        return json_grammar(format.json_schema.schema_)
    except ValueError as e:
        raise ApiError(400, str(e).removeprefix("Grammar: ")) from None


@dataclass
class GrammarCheck:
    """Compiles the grammars of requests before they wait, in a thread of its own, so that the event loop runs on."""

    grammars: dict[str, Grammars] = field(default_factory=dict)  # by the tokenizer's fingerprint
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "grammars"))

    async def __call__(self, requests: Sequence[Request], tokenizer: Tokenizer) -> None:
        """Raise ApiError if a grammar cannot be compiled."""
        loop = asyncio.get_running_loop()
        for grammar in {request.grammar for request in requests}:
            if grammar is not None:
                try:
                    await loop.run_in_executor(self.pool, self._compile, grammar, tokenizer)
                except (ValueError, UserError) as e:
                    raise ApiError(400, str(e)) from None

    def _compile(self, grammar: Grammar, tokenizer: Tokenizer) -> None:
        kept = self.grammars.get(tokenizer.fingerprint)
        if kept is None:
            kept = self.grammars[tokenizer.fingerprint] = Grammars(tokenizer, tokenizer.ends, tokenizer.n_vocab)
        kept.start(grammar)
