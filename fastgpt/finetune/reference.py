"""Reference log-probabilities: those of every sequence of a data set under the weights that a run starts with.

They are computed once, before the first step, so no second model is in memory, and stored in the run's folder with
hashes of the data and of the weights. A resumed run, whose weights are others by then, loads them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastgpt.core.errors import UserError
from fastgpt.core.tensorfile import load_file, save_file
from fastgpt.data.batch import Batch
from fastgpt.finetune.preference import Referenced
from fastgpt.models.gpt import GPT

NAME = "reference.safetensors"


def hash_weights(model: nn.Module) -> str:
    """Return a sha256 of the names, types, shapes and values of a model's tensors, in hex."""
    digest = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)} ".encode())
        digest.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def compute_reference(task: Referenced, model: GPT, batches: Iterable[Batch], rows: int) -> Tensor:
    """Return the log-probabilities of all rows of a data set, (rows, 2) fp32 on the model's device.

    Args:
        batches: they hold every row at least once; the pass ends when they do

    Raises:
        UserError: the model has dropout, a row is in no batch, or a log-probability is not finite.
    """
    task.prepare(model)
    found = torch.full((rows, 2), torch.nan, device=model.wte.weight.device)
    for batch in batches:
        index = batch.extra["index"]
        present = index >= 0
        found[index[present]] = task.policy(model, batch)[present].float()
    if missing := (~found.isfinite().all(1)).nonzero()[:, 0].tolist():
        raise UserError(
            f"row {missing[0]} of {rows} has no finite reference log-probability ({len(missing)} rows have none): the "
            "weights at the start are not finite there"
        )
    return found


def save_reference(path: Path, log_probs: Tensor, data: str, weights: str) -> None:
    """Write log-probabilities (rows, 2) with the hashes of their data and weights; the file appears complete or not at
    all.

    Raises:
        UserError: the file cannot be written.
    """
    values = log_probs.cpu()
    hashes = dict(data=data, weights=weights, values=hashlib.sha256(values.numpy().tobytes()).hexdigest())
    tensors = {name: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) for name, text in hashes.items()}
    aside = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"log_probs": values, **tensors}, aside)
        os.replace(aside, path)
    except OSError as e:
        aside.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({e.strerror})") from e


def load_reference(path: Path, data: str, weights: str | None) -> Tensor:
    """Return what `save_reference` wrote, on the CPU.

    Args:
        data: the hash of the data set
        weights: the hash of the weights that a new run starts with; None for a resumed run, whose weights are others

    Raises:
        UserError: the file is missing or damaged, or belongs to other data or weights.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: a run can only be resumed with its reference log-probabilities")
    tensors = load_file(path)
    try:
        values = tensors.pop("log_probs")
        found = {name: bytes(t.tolist()).decode() for name, t in tensors.items()}
        whole = hashlib.sha256(values.numpy().tobytes()).hexdigest() == found["values"]
        there = {name: found[name] for name in ("data", "weights")}
    except (KeyError, ValueError) as e:
        raise UserError(f"{path} is damaged: it holds no reference log-probabilities") from e
    if not whole or values.dim() != 2 or values.shape[1] != 2:
        raise UserError(f"{path} is damaged: its values do not have the hash that was stored with them")
    for name, here in (("data", data), ("weights", weights)):
        if here is not None and there[name] != here:
            raise UserError(f"{path} has the log-probabilities of other {name}; delete it to compute them anew")
    return values


def reference(
    path: Path, task: Referenced, model: GPT, batches: Iterable[Batch], rows: int, data: str, *, resumed: bool
) -> Tensor:
    """Return the reference log-probabilities of a run's data set, (rows, 2) fp32 on the model's device: from the file
    if it is there and fits, else computed and written to it.

    Args:
        path: the file in the run's folder
        model: for a new run, the model as it starts; a resumed run does not use its weights
        batches: as compute_reference
        data: a hash of the data set
        resumed: whether the run has taken steps

    Raises:
        UserError: as compute_reference, save_reference and, for a resumed run, load_reference.
    """
    device, weights = model.wte.weight.device, None if resumed else hash_weights(model)
    if resumed or path.is_file():
        try:
            found = load_reference(path, data, weights)
            if len(found) != rows:
                raise UserError(f"{path} has {len(found)} rows, expected {rows}")
            return found.to(device)
        except UserError:
            if resumed:
                raise  # of a new run the file is left from one that ended before its first checkpoint
    log_probs = compute_reference(task, model, batches, rows)
    save_reference(path, log_probs, data, weights or "")
    return log_probs
