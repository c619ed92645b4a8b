"""Write the shards of a data set: token ids in llm.c's format, the index of their documents, and the documents' ids.

train_000000.bin   ids with llm.c's header
train_000000.idx   little-endian int64: where each document starts, in tokens, and the number of tokens at the end
train_000000.ids   one line of JSON per document: [source, id]
val_<source>.*     the same for the documents of a source that were held out
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.data.pipeline.layout import open_table, parts_of_layout
from fastgpt.data.pipeline.mix import ENTRY
from fastgpt.data.pipeline.store import read_json, write_json
from fastgpt.data.pipeline.tokens import ROW
from fastgpt.data.shards import ShardWriter, atomic_file, file_hash, open_tokens

GATHERED = 1 << 22  # tokens brought into order in memory
OPEN_FILES = 128


@dataclass(frozen=True)
class ShardTask:
    """A shard to write.

    Attributes:
        folder, name: where, without a suffix.
        layout: folder with parts.json, one ROW table per source, and the order of the mixture.
        source: index of the source whose held-out documents to write; None for a shard of the mixture.
        first, count: entries of the order that the shard holds.
    """

    folder: Path
    name: str
    layout: Path
    n_vocab: int
    dtype: str
    source: int | None
    first: int
    count: int


def write_shard(task: ShardTask) -> dict[str, Any]:
    """Write the files of a shard and return its record: names, tokens, documents, and each file's size and sha256."""
    note = task.folder / f".{task.name}.json"
    done: dict[str, Any] | None = read_json(note)
    if done is not None:
        return done
    if task.source is not None:
        rows = np.array(open_table(task.layout, task.source, held=True))
    else:
        rows = _rows_of_mixture(task)
    parts = parts_of_layout(task.layout)
    with ShardWriter(task.folder / f"{task.name}.bin", task.n_vocab, task.dtype) as out:
        files = _Files()
        ends = np.cumsum(rows["tokens"])
        at = 0
        while at < len(rows):
            stop = max(at + 1, int(np.searchsorted(ends, ends[at] - rows["tokens"][at] + GATHERED, side="right")))
            out.write(_gather(rows[at:stop], parts, files, task.dtype))
            at = stop
        files.close()
    with atomic_file(task.folder / f"{task.name}.idx") as f:
        f.write(np.concatenate([[0], ends]).astype("<i8").tobytes())
    _write_ids(task, rows, parts)
    record = _record(task, len(rows))
    write_json(note, record)
    return record


def _rows_of_mixture(task: ShardTask) -> npt.NDArray[Any]:
    with open(task.layout / "order.bin", "rb") as f:
        entries = np.fromfile(f, ENTRY, task.count, offset=task.first * ENTRY.itemsize)
    rows = np.empty(len(entries), ROW)
    for source in np.unique(entries["source"]):
        mine = entries["source"] == source
        rows[mine] = open_table(task.layout, int(source), held=False)[entries["document"][mine]]
    return rows


def _gather(rows: npt.NDArray[Any], parts: Sequence[dict[str, Any]], files: _Files, dtype: str) -> npt.NDArray[Any]:
    """Return the ids of documents in the order of `rows`, reading them in the order in which they lie on disk."""
    starts = np.cumsum(rows["tokens"]) - rows["tokens"]
    out = np.empty(int(rows["tokens"].sum()), dtype)
    size = out.itemsize
    for i in np.lexsort((rows["at"], rows["part"])):
        n = int(rows["tokens"][i])
        path = Path(parts[rows["part"][i]]["tokens"], "tokens.bin")
        raw = files.read(path, int(rows["at"][i]) * size, n * size)
        out[starts[i] : starts[i] + n] = np.frombuffer(raw, dtype)
    return out


def _write_ids(task: ShardTask, rows: npt.NDArray[Any], parts: Sequence[dict[str, Any]]) -> None:
    names: list[str] = [""] * len(rows)
    files = _Files()
    for i in np.lexsort((rows["id_at"], rows["part"])):
        part = parts[rows["part"][i]]
        raw = files.read(Path(part["chunk"], "ids.bin"), int(rows["id_at"][i]), int(rows["id_bytes"][i]))
        names[i] = json.dumps([part["source"], raw.decode()], ensure_ascii=False)
    files.close()
    with atomic_file(task.folder / f"{task.name}.ids") as f:
        f.write("".join(name + "\n" for name in names).encode())


def _record(task: ShardTask, documents: int) -> dict[str, Any]:
    return shard_record(task.folder, task.name, documents, None if task.source is None else task.name[4:])


def shard_record(folder: Path, name: str, documents: int, source: str | None) -> dict[str, Any]:
    """Return what the manifest says about a shard; source: None for one of the mixture."""
    tokens = open_tokens(folder / f"{name}.bin")
    files = {}
    for suffix in (".bin", ".idx", ".ids"):
        path = folder / (name + suffix)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
    record = {"name": name, "tokens": len(tokens), "documents": documents, "sample": tokens.fingerprint()}
    return record | {"source": source, "files": files}


def documents_of(folder: Path, name: str) -> tuple[npt.NDArray[np.int64], list[list[str]]]:
    """Return (starts, ids) of a shard: starts (documents + 1,) in tokens, ids [source, id] of each document."""
    starts = np.fromfile(folder / f"{name}.idx", "<i8")
    lines = (folder / f"{name}.ids").read_text(encoding="utf-8").split("\n")[:-1]
    return starts, [json.loads(line) for line in lines]


class _Files:
    """Open files to read ranges of, the most recently used ones."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()

    def read(self, path: Path, at: int, n: int) -> bytes:
        fd = self._open.pop(path, None)
        if fd is None:
            fd = os.open(path, os.O_RDONLY)
        self._open[path] = fd
        if len(self._open) > OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        raw = os.pread(fd, n, at)
        while len(raw) < n and (more := os.pread(fd, n - len(raw), at + len(raw))):
            raw += more
        if len(raw) < n:
            raise OSError(f"{path} is shorter than its table says")
        return raw

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])
