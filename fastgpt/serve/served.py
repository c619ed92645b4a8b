"""The models of a server by name: tokenizer, chat template and defaults in this process, weights in an engine's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastgpt.core.errors import UserError, cause_of
from fastgpt.data import Tokenizer
from fastgpt.data.load import load_tokenizer
from fastgpt.evaluate.target import find_model
from fastgpt.inference.adapters import adapter_folder
from fastgpt.inference.chat import Template
from fastgpt.models.weights.peft import CONFIG
from fastgpt.serve.engine import Model
from fastgpt.serve.link import Link
from fastgpt.training.adapters import require_tokenizer, template_of
from fastgpt.training.initial import open_initial

DEFAULTS = ("temperature", "top_p", "top_k", "repetition_penalty", "min_p")  # read from generation_config.json


@dataclass
class Served:
    """A model that the server offers.

    Attributes:
        name: as clients ask for it.
        tokenizer: encodes prompts.
        template: turns messages into a prompt.
        link: its engine.
        defaults: settings of generation_config.json that a request does not give.
        created: seconds since 1970 at which the weights were written.
        adapter: name of the adapter in the engine; None: the base model.
        parent: name of the base model of an adapter.
        root: path of the weights.
        version: number in its deployment; None where it is not of one.
        held: calls that have found this model and may not have reached the engine yet.
    """

    name: str
    tokenizer: Tokenizer
    template: Template
    link: Link
    defaults: dict[str, Any] = field(default_factory=dict)
    created: int = 0
    adapter: str | None = None
    parent: str | None = None
    root: str = ""
    version: int | None = None
    held: int = 0

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep the engine from being closed by a roll-out while the block runs."""
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its continuation."""
        return self.link.context


def serve_model(name: str, model: Model, queue: int) -> Served:
    """Open a model's tokenizer and start its engine.

    Raises:
        UserError: it has no tokenizer, or cannot be served, or an adapter does not fit.
    """
    folder, _ = find_model(model.path)
    start = open_initial(folder)
    if start.tokenizer is None:
        raise UserError(f"{model.path} has no tokenizer, expected one beside the weights")
    tokenizer = load_tokenizer(start.tokenizer)
    eos = tokenizer.decode_bytes([tokenizer.eot]).decode()
    template = Template.of_run(folder, eos, tokenizer.bos)
    defaults = read_defaults(folder / "generation_config.json")
    for path in model.adapters.values():
        require_tokenizer(path, tokenizer)
    created = int(folder.stat().st_mtime)
    return Served(name, tokenizer, template, Link(model, queue), defaults, created, root=model.path)


def serve_adapter(name: str, path: str, base: Served) -> Served:
    """Return an adapter that the base's engine has, or is to load, as a model: with the base's tokenizer and defaults,
    and a chat template of its own if its folder has one.

    Raises:
        UserError: there is none, or it was trained with another tokenizer.
    """
    require_tokenizer(path, base.tokenizer)
    template = template_of(path, base.tokenizer) or base.template
    created = int((adapter_folder(path) / CONFIG).stat().st_mtime)
    return replace(base, name=name, template=template, created=created, adapter=name, parent=base.name, root=path)


def read_defaults(file: Path) -> dict[str, Any]:
    """Return the sampling settings of a generation_config.json; nothing if there is none.

    Raises:
        UserError: the file is damaged.
    """
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        found = {name: values[name] for name in DEFAULTS if values.get(name) is not None}
    except (OSError, ValueError, AttributeError) as e:
        raise UserError(f"{file} cannot be read ({cause_of(e)}), expected JSON") from None
    if values.get("do_sample") is False:  # transformers then takes the most likely token, whatever else is set
        found["temperature"] = 0.0
    if found.get("top_k") == 0:  # off
        del found["top_k"]
    return found
