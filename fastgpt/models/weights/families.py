"""The families of Hugging Face models that fastgpt.models.gpt.GPT hosts.

A family hosts a ModelConfig if reading the config.json that it writes gives the same model back, so `family_for` needs
no list of what each family lacks.
"""

from __future__ import annotations

from contextlib import suppress

from fastgpt.core.errors import UserError
from fastgpt.models.config import ModelConfig
from fastgpt.models.weights.family import Config, Family
from fastgpt.models.weights.gpt_families import GPT2, GPT_NEO, GPT_NEOX, GPTJ
from fastgpt.models.weights.llama_families import GEMMA, LLAMA, MISTRAL, QWEN2, QWEN3

FAMILIES = {f.model_type: f for f in (GPT2, GPT_NEO, GPTJ, GPT_NEOX, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA)}


def family_of(config: Config, where: str = "config.json") -> Family:
    """Return the family of a config.json.

    Raises:
        UserError: another model_type.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{where} has model_type {kind!r}, expected one of {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def family_for(c: ModelConfig, prefer: str | None = None) -> Family:
    """Return a family that hosts a model: `prefer`, if it does.

    Raises:
        UserError: no family does.
    """
    order = sorted(FAMILIES.values(), key=lambda family: family.model_type != prefer)
    for family in order:
        if family.hosts(c):
            return family
    near: dict[str, list[str]] = {}
    for family in order:
        with suppress(UserError):
            near[family.model_type] = family.differences(c)
    name = min(near, key=lambda model_type: len(near[model_type]), default="gpt2")
    differs = ", ".join(near.get(name, ["its sizes"]))
    raise UserError(f"no model of transformers is this one: the nearest, {name}, differs in {differs}")
