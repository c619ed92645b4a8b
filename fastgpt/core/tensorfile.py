"""Tensor files in the safetensors format: the header's length in 8 bytes, the header as JSON, the tensors' bytes.

Source: huggingface.co/docs/safetensors. Implemented here rather than imported, so a run needs no package other than
torch and numpy. The safetensors package reads these files and would write the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save_file(tensors: dict[str, Tensor], path: Path) -> None:
    """Write named CPU tensors to a file.

    Raises:
        OSError: the file cannot be written.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # every tensor lies aligned
    header, start = {}, 0
    for name in names:
        t = tensors[name]
        end = start + t.numel() * t.dtype.itemsize
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            f.write(tensors[name].detach().contiguous().view(-1).view(torch.uint8).numpy().data)


def load_file(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a file onto the CPU, each in separate memory."""
    found = {}
    with path.open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            raw = torch.empty(end - start, dtype=torch.uint8)
            f.readinto(raw.numpy().data)
            found[name] = raw.view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return found
