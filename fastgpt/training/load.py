"""Load the model and the tokenizer of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastgpt.core.errors import UserError
from fastgpt.data import Tokenizer
from fastgpt.data.load import load_tokenizer
from fastgpt.models.config import model_from_dict
from fastgpt.models.gpt import GPT
from fastgpt.training import checkpoint


def tokenizer_of(checkpoint_folder: Path, state: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer of the run of a checkpoint, whose state.json is `state`.

    Raises:
        UserError: it is missing, damaged, or not the one that the checkpoint was trained with.
    """
    file = checkpoint_folder.parent / "tokenizer.json"
    tokenizer = load_tokenizer(file)
    if tokenizer.fingerprint != state["tokenizer"]:
        raise UserError(f"{file} is not the tokenizer that {checkpoint_folder} was trained with")
    return tokenizer


def load_run(path: str | Path, device: torch.device) -> tuple[GPT, Tokenizer, Path]:
    """Return model (in eval mode, on `device`), tokenizer and checkpoint folder of `path`, a run or a checkpoint.

    Raises:
        UserError: there is none, it is damaged, or the run's tokenizer.json is not the one it was trained with.
    """
    found = checkpoint.find(path)
    state = checkpoint.read_state(found)
    checkpoint.require_model(found, state)
    tokenizer = tokenizer_of(found, state)
    model = GPT(model_from_dict(state["model"]))
    model.load_state_dict(checkpoint.read_tensors(found, checkpoint.MODEL, state))
    return model.to(device).eval(), tokenizer, found
