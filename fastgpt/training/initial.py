"""Start a run from the weights of another run, or of a folder in Hugging Face's form, with a fresh optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.core.errors import UserError
from fastgpt.data.load import has_tokenizer, load_tokenizer
from fastgpt.distributed.shards import share
from fastgpt.models.config import ModelConfig, model_from_dict
from fastgpt.models.gpt import GPT
from fastgpt.models.weights import open_pretrained
from fastgpt.training import checkpoint
from fastgpt.training.config import TrainConfig

FREE = ("embed_dropout", "attn_dropout", "resid_dropout", "init_std")  # settings of a run, not of its weights


@dataclass(frozen=True)
class Initial:
    """Weights to start from, read one parameter at a time.

    Attributes:
        origin: name and revision of the model, for the record.
        tokenizer: folder or tokenizer.json; None where there is none.
        read: returns a parameter by its name.
    """

    config: ModelConfig
    tokenizer: Path | None
    read: Callable[[str], Tensor]
    origin: dict[str, Any]


def open_initial(path: str | Path) -> Initial:
    """Open a run, a checkpoint, or a folder with config.json and weights.

    Raises:
        UserError: it is neither, or damaged.
    """
    path = Path(path)
    if not checkpoint.checkpoints(path) and not (path / checkpoint.STATE).is_file():
        if not path.is_dir():
            raise UserError(f"init is {str(path)!r}, expected a run, a checkpoint or a folder with a model")
        weights = open_pretrained(path)
        origin = {"name": path.resolve().name, "revision": None}
        return Initial(weights.config, path if has_tokenizer(path) else None, weights.read, origin)
    found = checkpoint.find(path)
    state = checkpoint.read_state(found)
    checkpoint.require_model(found, state)
    entries = checkpoint.open_tensors(found, checkpoint.MODEL, state)
    tokenizer = None if state["tokenizer"] is None else found.parent / "tokenizer.json"
    given = state.get("source", {"name": found.parent.resolve().name, "revision": f"step {state['step']}"})
    origin = {key: given[key] for key in ("name", "revision")}
    return Initial(model_from_dict(state["model"]), tokenizer, lambda name: entries[name].read(), origin)


def settle(cfg: TrainConfig) -> TrainConfig:
    """Return the settings with the model and the tokenizer of `cfg.init`; a run that goes on has its own.

    Raises:
        UserError: as open_initial; or cfg.tokenizer is another tokenizer, or text cannot be encoded.
    """
    if not cfg.init:
        return cfg
    goes_on = cfg.resume == "auto" and checkpoint.checkpoints(Path(cfg.out or "runs/train"))
    start = open_initial(cfg.out or "runs/train" if goes_on else cfg.init)
    model = dataclasses.replace(start.config, **{name: getattr(cfg.model, name) for name in FREE})
    tokenizer = cfg.tokenizer or (None if start.tokenizer is None else str(start.tokenizer))
    if cfg.tokenizer and start.tokenizer:
        given, own = load_tokenizer(cfg.tokenizer), load_tokenizer(start.tokenizer)
        if given.fingerprint != own.fingerprint:
            raise UserError(f"tokenizer is {cfg.tokenizer!r}, expected that of init, {start.tokenizer}")
    if tokenizer is None and not (cfg.data or "").endswith(".bin"):
        raise UserError(f"init: {cfg.init} has no tokenizer, so data is {cfg.data!r}, expected .bin files")
    return dataclasses.replace(cfg, model=model, tokenizer=tokenizer)


@torch.no_grad()
def load_initial(model: GPT, path: str) -> dict[str, Any]:
    """Copy the weights of `path` into a model whose settings `settle` took from there; return their origin.

    Raises:
        UserError: as open_initial, or weights that are not finite.
    """
    start = open_initial(path)
    for name, p in model.named_parameters():
        p.copy_(share(start.read(name), p))
    return start.origin


@torch.no_grad()
def load_start(start: Initial, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> GPT:
    """Build a model with the weights of `start`.

    Raises:
        UserError: a value is not finite.
    """
    with torch.device("meta"):
        model = GPT(config)
    model = model.to(dtype=dtype).to_empty(device=device)
    for name, p in model.named_parameters():
        p.copy_(start.read(name))
        if not bool(p.isfinite().all()):
            raise UserError(f"{start.origin['name']}: {name} has values that are not finite, expected numbers")
    return model
