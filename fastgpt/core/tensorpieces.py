"""Tensors that lie in pieces in several tensor files; each file says where in a tensor its piece begins.

The files have the form that PyTorch's HuggingFaceStorageWriter writes, so HuggingFaceStorageReader and
consolidate_safetensors_files of torch.distributed.checkpoint read them too. A file of whole tensors is read like one
that has all pieces.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastgpt.core.errors import UserError
from fastgpt.core.tensorfile import DTYPES, Entry, read_file_header

KEY, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"

Offsets = tuple[int, ...]  # of the first element of a piece in the whole tensor, by dimension


@dataclass(frozen=True)
class Pieces:
    """Where the pieces of a tensor lie; `dtype` is the file format's name of it."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[tuple[Offsets, Entry], ...]

    def read(self) -> Tensor:
        """Return the whole tensor, in memory of its own.

        Raises:
            UserError: a file cannot be read, or is shorter than when it was opened.
        """
        if len(self.parts) == 1:
            return self.parts[0][1].read()
        whole = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        for offsets, entry in self.parts:
            whole[tuple(slice(o, o + n) for o, n in zip(offsets, entry.shape, strict=True))] = entry.read()
        return whole


def metadata_of(offsets: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Return the metadata of a file with pieces that begin at these offsets, by the names of their tensors."""
    return {KEY: json.dumps({name: {OFFSETS: list(begin)} for name, begin in offsets.items()})}


def open_pieces(paths: Iterable[Path]) -> dict[str, Pieces]:
    """Return the tensors of some files by name.

    Raises:
        UserError: a file cannot be read or is damaged, or the pieces of a tensor do not make it whole.
    """
    parts: dict[str, list[tuple[Offsets, Entry]]] = {}
    for path in paths:
        entries, metadata = read_file_header(path)
        begins = json.loads(metadata.get(KEY, "{}"))
        for name, entry in entries.items():
            begin = begins[name][OFFSETS] if name in begins else [0] * len(entry.shape)
            parts.setdefault(name, []).append((tuple(begin), entry))
    return {name: _joined(name, found) for name, found in parts.items()}


def _joined(name: str, parts: list[tuple[Offsets, Entry]]) -> Pieces:
    """Return the pieces of a tensor in order, without the empty ones of processes that had no share of it."""
    first = parts[0][1]
    ends = [[o + n for o, n in zip(begin, entry.shape, strict=True)] for begin, entry in parts]
    shape = tuple(map(max, zip(*ends, strict=True)))
    full = sorted((part for part in parts if math.prod(part[1].shape)), key=lambda part: part[0]) or parts[:1]
    whole = sum(math.prod(entry.shape) for _, entry in full) == math.prod(shape)
    if not whole or any(entry.dtype != first.dtype for _, entry in full):
        raise UserError(f"{first.path.parent}: the pieces of {name} do not make a whole tensor of one dtype")
    return Pieces(first.dtype, shape, tuple(full))
