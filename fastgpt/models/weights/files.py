"""Read a folder of weights in Hugging Face's form, and write one: one file, or shards with an index.

Tensors are read one at a time, by their place in the file, and written one after the other, so that a conversion holds
the tensors of one parameter in memory and not the model.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.core import tensorfile
from fastgpt.core.errors import UserError
from fastgpt.core.tensorfile import DTYPES, NAMES

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
OLD_FILE, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHARD_BYTES = 5_000_000_000  # as transformers cuts them, in the decimal unit of its --max-shard-size


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a file: its dtype by the safetensors format's name, its shape, and how to read it."""

    where: Path
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def open_folder(folder: Path) -> dict[str, FileTensor]:
    """Return the tensors in a folder by name: model.safetensors, the shards of its index, or pytorch_model.bin.

    Raises:
        UserError: none of these is there, a file is missing or damaged, or a tensor is in two of them.
    """
    if (folder / FILE).is_file():
        return _open(folder / FILE)
    if (folder / INDEX).is_file():
        return _open_shards(folder / INDEX)
    if (folder / OLD_FILE).is_file():
        return open_pickle(folder / OLD_FILE)
    if (folder / OLD_INDEX).is_file():
        return _open_shards(folder / OLD_INDEX)
    raise UserError(f"{folder} has no weights, expected {FILE}, {INDEX} or {OLD_FILE}")


def _open(path: Path) -> dict[str, FileTensor]:
    found = tensorfile.read_header(path)
    return {name: FileTensor(path, entry.dtype, entry.shape, entry.read) for name, entry in found.items()}


def open_pickle(path: Path) -> dict[str, FileTensor]:
    """Open a file of torch.save, mapped into memory and without running any code in it."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        tensors = {str(name): t for name, t in loaded.items() if isinstance(t, Tensor)}
    except Exception as e:  # zip, pickle and torch raise errors of many kinds
        why = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(f"{path} is damaged, or holds more than weights ({why})") from e
    return {
        name: FileTensor(path, NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape), lambda t=t: t.clone())  # type: ignore[misc]
        for name, t in tensors.items()
    }


def _open_shards(index: Path) -> dict[str, FileTensor]:
    """Open the shards that an index names; shards and index must agree on every tensor."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("a shard outside the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{index} is damaged: it has no weight_map of tensors to files ({e})") from e
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(f"{index} names {some(absent)}, which {'is' if len(absent) == 1 else 'are'} not there")
    shards = {name: (_open if name.endswith(".safetensors") else open_pickle)(index.parent / name) for name in names}
    counts = Counter(name for shard in shards.values() for name in shard)
    if twice := sorted(name for name, n in counts.items() if n > 1):
        where = [shard for shard, tensors in shards.items() if twice[0] in tensors]
        raise UserError(f"{index.parent} has {some(twice)} in two shards, {where[0]} and {where[1]}")
    if lost := sorted(name for name, shard in places.items() if name not in shards[shard]):
        raise UserError(f"{index} places {some(lost)} in {places[lost[0]]}, which does not have it")
    return {name: t for shard in shards.values() for name, t in shard.items()}


def some(names: Sequence[str], most: int = 8) -> str:
    """Return names for an error message, at most `most` of them."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_tensors(
    found: dict[str, FileTensor], expected: dict[str, tuple[int, ...]], ignored: re.Pattern[str], where: str
) -> None:
    """Refuse tensors that are missing, of another shape, not of floats, or not of the model.

    Raises:
        UserError: one sentence that lists them all by kind.
    """
    both = sorted(set(found) & set(expected))
    floats = [name for name in DTYPES if DTYPES[name].is_floating_point]
    shaped = [
        f"{name} {list(found[name].shape)} for {list(expected[name])}"
        for name in both
        if found[name].shape != expected[name]
    ]
    typed = [f"{name} ({found[name].dtype})" for name in both if found[name].dtype not in floats]
    extra = sorted(name for name in set(found) - set(expected) if not ignored.search(name))
    faults = {
        "misses": sorted(set(expected) - set(found)),
        "has beyond the model's": extra,
        "has in another shape": shaped,
        f"has in another type than {', '.join(floats)}": typed,
    }
    said = [f"{what} {some(names)}" for what, names in faults.items() if names]
    if said:
        raise UserError(f"{where} {'; '.join(said)}")


Described = list[tuple[str, torch.dtype, tuple[int, ...]]]  # name, dtype, shape


def write_folder(folder: Path, described: Described, tensors: Iterable[Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Write model.safetensors, or shards of at most `shard_bytes` (a larger tensor gets its own) with their index.

    Args:
        tensors: in the order of `described`; each is written before the next one is asked for.

    Raises:
        OSError: the files cannot be written.
    """
    shards: list[Described] = [[]]
    size = 0
    for name, dtype, shape in described:
        n = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and size + n > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, dtype, shape))
        size += n
    many = len(shards) > 1
    stream = iter(tensors)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if many else FILE
        with (folder / file).open("wb") as f:
            f.write(tensorfile.header_of(shard, {"format": "pt"}))
            tensorfile.write_tensors(f, shard, (next(stream) for _ in shard))
        weight_map |= {name: file for name, _, _ in shard}
    if many:
        count = [torch.Size(shape).numel() for _, _, shape in described]
        total = sum(n * dtype.itemsize for n, (_, dtype, _) in zip(count, described, strict=True))
        metadata: dict[str, Any] = {"total_parameters": sum(count), "total_size": total}
        text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2)
        (folder / INDEX).write_text(text, encoding="utf-8")
