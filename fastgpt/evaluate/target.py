"""Open what is to be evaluated: a model with its tokenizer, its chat template, and what identifies it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.core.device import DTYPES, default_device, dtype_of, keep_freed_memory
from fastgpt.core.errors import UserError
from fastgpt.data import Tokenizer
from fastgpt.data.load import load_tokenizer
from fastgpt.inference.chat import FILE, Template
from fastgpt.models.gpt import GPT
from fastgpt.training import checkpoint
from fastgpt.training.initial import load_start, open_initial


@dataclass
class Target:
    """A model to evaluate.

    Attributes:
        model: in eval mode, on its device.
        tokenizer: of the model.
        name: the path as the user gave it.
        folder: the checkpoint, or the folder with config.json.
        about: name, folder, step and tokens (None if unknown), and a fingerprint of the stored weights.
        chat: the chat template; None if the tokenizer has none.
        settings: of the run of `fastgpt train` that trained it, as plain values; empty for other models.
    """

    model: GPT
    tokenizer: Tokenizer
    name: str
    folder: Path
    about: dict[str, Any]
    chat: Template | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def tokenizer_file(self) -> str | None:
        """The tokenizer.json beside the weights or in the run; None if there is none."""
        files = [folder / "tokenizer.json" for folder in (self.folder, self.folder.parent)]
        return next((str(file) for file in files if file.is_file()), None)


def open_target(path: str, *, device: str = "auto", dtype: str | None = None) -> Target:
    """Open a run, a checkpoint, or a folder with config.json and weights; of a run of adapters, its folder `merged`.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "fp32", "bf16" or "fp16"; default bf16 on a GPU and fp32 on a CPU.

    Raises:
        UserError: there is no model, it has a task head, no tokenizer, or weights that are not finite; or the device or
            the dtype does not exist.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    folder, state = find_model(path)
    start = open_initial(folder)
    if start.tokenizer is None:
        raise UserError(f"{path} has no tokenizer, expected one beside the weights")
    tokenizer = load_tokenizer(start.tokenizer)
    if state.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(f"{start.tokenizer} is not the tokenizer that {folder} was trained with")
    if tokenizer.n_vocab > (start.config.vocab_size or 0):
        raise UserError(
            f"{start.tokenizer} has {tokenizer.n_vocab} ids and the model {start.config.vocab_size}, "
            "expected the tokenizer of the model"
        )
    on = default_device(device)
    if on.type == "cpu":
        keep_freed_memory()  # passes allocate the same sizes again and again
    digest = hashlib.sha256()
    read = dataclasses.replace(start, read=_hashed(start.read, digest.update))
    model = load_start(read, start.config, dtype_of(dtype or "auto", on.type), on).eval().requires_grad_(False)
    about = {
        "name": path,
        "folder": str(folder),
        "step": state.get("step"),
        "tokens": state.get("progress", {}).get("tokens"),
        "fingerprint": digest.hexdigest(),
    }
    settings = {} if "base" in state else state.get("config", {})  # a fine-tuned run has rows, no corpus
    return Target(model, tokenizer, path, folder, about, template_of(tokenizer, path), settings)


def find_model(path: str) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint that a path stands for with its state.json, or a folder of another kind with nothing."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"{path} is not a folder, expected a run, a checkpoint or a folder with config.json and weights"
        )
    if not checkpoint.checkpoints(folder) and not (folder / checkpoint.STATE).is_file():
        return folder, {}
    found = checkpoint.find(folder)
    state = checkpoint.read_state(found)
    if head := state.get("head"):
        raise UserError(
            f"{path} has a head for {head['kind']}, expected a language model; "
            "`fastgpt finetune` reports the metrics of a head at each validation"
        )
    if state.get("adapters"):
        found = checkpoint.merged(found, state, of_run=found != folder)
        state = checkpoint.read_state(found)
    return found, state


def _hashed(read: Callable[[str], Tensor], update: Callable[[Any], None]) -> Callable[[str], Tensor]:
    """Return a `read` that passes the name, dtype and bytes of what is read to `update`."""

    def hashed(name: str) -> Tensor:
        t = read(name)
        update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return t

    return hashed


def template_of(tokenizer: Tokenizer, path: str) -> Template | None:
    """Return the chat template that the tokenizer carries."""
    text = tokenizer.companions.get(FILE)
    if text is None:
        return None
    eos = tokenizer.decode_bytes([tokenizer.eot]).decode()
    return Template(text, f"the chat template of {path}", eos, tokenizer.bos)
