"""Tensor files in the safetensors format: the header's length in 8 bytes, the header as JSON, the tensors' bytes.

Source: huggingface.co/docs/safetensors. Implemented here rather than imported, so a run needs no package other than
torch and numpy. The safetensors package reads these files and would write the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastgpt.core.errors import UserError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_HEADER = 100_000_000  # bytes, as in the safetensors package


@dataclass(frozen=True)
class Deferred:
    """A tensor that is made when it is written, so that few of them are in memory at a time."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a file; `dtype` is the format's name of it, which torch may not have."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def read(self) -> Tensor:
        """Return the tensor, in memory of its own.

        Raises:
            UserError: the file cannot be read, or is shorter than when it was opened.
        """
        raw = torch.empty(self.end - self.start, dtype=torch.uint8)
        try:
            with self.path.open("rb") as f:
                f.seek(self.start)
                size = f.readinto(raw.numpy().data)
        except OSError as e:
            raise UserError(f"{self.path} cannot be read ({e.strerror})") from e
        if size != len(raw):
            raise UserError(f"{self.path} was truncated while it was read")
        return raw.view(DTYPES[self.dtype]).view(self.shape)


Described = Sequence[tuple[str, torch.dtype, Sequence[int]]]  # name, dtype, shape


def save_file(tensors: Mapping[str, Tensor | Deferred], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write named tensors to a file, with texts in its header that `read_metadata` returns.

    Raises:
        OSError: the file cannot be written.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # every tensor lies aligned
    described = [(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in names]
    made = (t.make() if isinstance(t, Deferred) else t for t in map(tensors.__getitem__, names))
    with path.open("wb") as f:
        f.write(header_of(described, metadata))
        write_tensors(f, described, made)


def header_of(described: Described, metadata: dict[str, str] | None = None) -> bytes:
    """Return a file's bytes before those of its tensors, which lie in the order given."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    start = 0
    for name, dtype, shape in described:
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(f: BinaryIO, described: Described, tensors: Iterable[Tensor]) -> None:
    """Write the bytes of tensors as the header describes them."""
    for (name, dtype, shape), t in zip(described, tensors, strict=True):
        assert t.dtype == dtype and tuple(t.shape) == tuple(shape), (name, t.dtype, t.shape)
        f.write(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def read_header(path: Path) -> dict[str, Entry]:
    """Return the entries of a file by name.

    Raises:
        UserError: it cannot be read, is truncated, or is not a tensor file.
    """
    return read_file_header(path)[0]


def read_metadata(path: Path) -> dict[str, str]:
    """Return the texts that a file's header has beside the tensors. Raises as `read_header`."""
    return read_file_header(path)[1]


def read_file_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the tensors of a file and the texts that its header has beside them. Raises as `read_header`."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            n = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(n)) if n <= min(size - 8, MOST_HEADER) else None
        if header is None:
            raise UserError(f"{path} is truncated or no tensor file: it has {size} bytes, its header alone {n}")
        metadata = {str(key): str(value) for key, value in dict(header.pop("__metadata__", None) or {}).items()}
        found = {name: _entry(path, 8 + n, entry) for name, entry in header.items()}
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror})") from e
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path} is damaged: its header is not that of a tensor file ({type(e).__name__}: {e})") from e
    end = max((entry.end for entry in found.values()), default=8 + n)
    if size < end:
        raise UserError(f"{path} is truncated: it has {size} bytes, its header describes {end}")
    spans = sorted((entry.start, entry.end) for entry in found.values())
    if any(a[1] > b[0] for a, b in pairwise(spans)):
        raise UserError(f"{path} is damaged: tensors overlap in its header")
    return found, metadata


def _entry(path: Path, base: int, entry: dict[str, Any]) -> Entry:
    (start, end), shape = entry["data_offsets"], tuple(int(n) for n in entry["shape"])
    wanted = math.prod(shape) * DTYPES[entry["dtype"]].itemsize if entry["dtype"] in DTYPES else end - start
    if not 0 <= start <= end or end - start != wanted or any(n < 0 for n in shape):
        raise ValueError(f"{end - start} bytes for shape {list(shape)}")
    return Entry(path, str(entry["dtype"]), shape, base + start, base + end)


def load_file(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a file onto the CPU, each in separate memory.

    Raises:
        UserError: the file is truncated or damaged.
    """
    found = read_header(path)
    return {name: entry.read() for name, entry in sorted(found.items(), key=lambda item: item[1].start)}
