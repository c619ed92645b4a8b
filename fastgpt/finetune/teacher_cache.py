"""The teacher's k most likely tokens at each position of a data set, computed once and written to a file.

A position is found by what the teacher read there: the key of a position is a 64-bit hash of the tokens of its document
up to it. So packing, order and epochs may differ from those of the run that wrote the file, and no index needs to
travel with a batch. The sum of hashes makes a key from a difference of prefix sums. Two of 10^7 prefixes have one key
with a probability of 3e-6.

File (safetensors): keys (M,) int64, sorted; ids (M, k) int32; log_probs (M, k + 1) fp32, the last that of all other
tokens together; temperature and vocab_size (1,).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.core.errors import UserError
from fastgpt.core.tensorfile import load_file, save_file
from fastgpt.data import IGNORE
from fastgpt.data.batch import Batch
from fastgpt.finetune.teacher import Teacher

ROWS = 128  # of logits at a time
_FIRST, _SECOND, _GOLDEN = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB  # splitmix64


def _mixed(x: Tensor) -> Tensor:
    """Return the finaliser of splitmix64 of each int64."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _FIRST
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _SECOND
    return x ^ (x >> 31 & (1 << 33) - 1)


def keys_of(batch: Batch) -> Tensor:
    """Return the key of each position, (B, T) int64: a hash of the document's tokens up to it, in their order."""
    b, t = batch.ids.shape
    place = torch.arange(t, device=batch.ids.device).expand(b, t)
    starts = torch.zeros_like(place)
    if batch.doc_ids is not None:
        begins = torch.ones_like(batch.doc_ids, dtype=torch.bool)
        begins[:, 1:] = batch.doc_ids[:, 1:] != batch.doc_ids[:, :-1]
        starts = torch.where(begins, place, 0).cummax(1).values  # (B, T): the first place of each document
    each = _mixed(_mixed(batch.ids + 1) + (place - starts) * _GOLDEN)
    sums = each.cumsum(1)
    before = torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], 1)
    return _mixed(sums - before.gather(1, starts) + (place - starts))


class TeacherCache:
    """What `write_teacher_cache` wrote, on a device.

    Attributes:
        temperature: of the log-probabilities.
        vocab_size: of the teacher's distribution.

    Raises:
        UserError: the file is missing, or not such a cache.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        self.path = path
        if not path.is_file():
            raise UserError(f"{path} is missing, expected a cache of a teacher's log-probabilities")
        tensors = load_file(path)
        try:
            self.keys, self.ids, self.log_probs = (tensors[n].to(device) for n in ("keys", "ids", "log_probs"))
            self.temperature, self.vocab_size = float(tensors["temperature"]), int(tensors["vocab_size"])
        except KeyError as e:
            raise UserError(f"{path} has no tensor {e}, expected a cache of a teacher's log-probabilities") from e

    def find(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return ids (N, k) int64 and log-probabilities (N, k + 1) fp32 of a batch, in the order of its tokens.

        Rows without a target have any values.

        Raises:
            UserError: on a CPU, a token with a target is not in the cache. On a GPU its values are NaN.
        """
        keys = keys_of(batch).reshape(-1)
        at = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        missing = (self.keys[at] != keys) & (batch.targets.reshape(-1) != IGNORE)
        if keys.device.type == "cpu" and bool(missing.any()):
            row, token = divmod(int(missing.nonzero()[0]), batch.ids.shape[1])
            raise UserError(
                f"{self.path} has nothing for token {token} of row {row} of a batch: it was made from other data or "
                "another tokenizer, or with shorter rows"
            )
        return self.ids[at].long(), torch.where(missing[:, None], torch.nan, self.log_probs[at])


def cached(
    folder: Path,
    load: Callable[[], Teacher],
    batches: Iterable[Batch],
    k: int,
    vocab_size: int,
    temperature: float,
    drawn_from: Any,
) -> Path:
    """Return the cache of a run, after writing it with the teacher that `load` returns if it is missing.

    Args:
        folder: of the run.
        batches, k, vocab_size, temperature: as in write_teacher_cache.
        drawn_from: plain values that identify the teacher and the data; with others the cache is another file.

    Raises:
        UserError: as write_teacher_cache.
    """
    digest = hashlib.sha256(json.dumps([drawn_from, k, vocab_size, temperature]).encode()).hexdigest()
    path = folder / f"teacher-{digest[:12]}.safetensors"
    if not path.is_file():
        n = write_teacher_cache(path, load(), batches, k, vocab_size, temperature)
        print(f"{path}: the teacher's {k} most likely tokens at {n:,} positions, {path.stat().st_size / 1e6:,.1f} MB")
    return path


@torch.no_grad()
def write_teacher_cache(
    path: Path, teacher: Teacher, batches: Iterable[Batch], k: int, vocab_size: int, temperature: float = 1.0
) -> int:
    """Write the teacher's k most likely tokens at every position with a target, and return the number of positions.

    Args:
        batches: the data, each position at least once.
        vocab_size: tokens of the student's vocabulary; the teacher's further outputs are left out.
        temperature: divides the logits.

    Raises:
        UserError: k does not fit, the data have no target, or the file cannot be written.
    """
    if not 1 <= k <= min(vocab_size, teacher.weight.shape[0]):
        raise UserError(f"k is {k}, expected 1 to {min(vocab_size, teacher.weight.shape[0])}, the vocabulary")
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in batches:
        kept = (batch.targets.reshape(-1) != IGNORE).nonzero()[:, 0]
        keys, h = keys_of(batch).reshape(-1)[kept].cpu(), teacher.hidden(batch)[kept]
        weight, bias = teacher.weight[:vocab_size], None if teacher.bias is None else teacher.bias[:vocab_size]
        for start in range(0, len(kept), ROWS):
            z = torch.nn.functional.linear(h[start : start + ROWS], weight, bias).float() / temperature
            logp = z.log_softmax(-1)
            top, ids = logp.topk(k)
            rest = logp.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
            parts.append((keys[start : start + ROWS], ids.int().cpu(), torch.cat([top, rest], 1).cpu()))
    if not parts:
        raise UserError(f"{path}: the data have no token with a target, expected some")
    keys, ids, log_probs = (torch.cat(column) for column in zip(*parts))
    keys, order = keys.sort(stable=True)
    first = torch.cat([torch.ones(1, dtype=torch.bool), keys[1:] != keys[:-1]])
    order = order[first]
    tensors = {"keys": keys[first], "ids": ids[order], "log_probs": log_probs[order]}
    tensors |= {"temperature": torch.tensor([temperature]).double(), "vocab_size": torch.tensor([vocab_size])}
    aside = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, aside)
        os.replace(aside, path)
    except OSError as e:
        aside.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({e.strerror})") from e
    return len(order)
