"""Token shards: llm.c's header files and nanoGPT's raw files, read in place through np.memmap, and their writer.

llm.c: 1024 bytes of header (256 int32: magic, version, number of tokens, zeros), then the ids, little-endian;
magic 20240520 version 1 is uint16, magic 20240801 version 7 is uint32. nanoGPT: ids only, uint16. Several shards form
one stream of tokens; only the windows that are read are copied.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fastgpt.core.errors import UserError

HEADER_BYTES = 1024
FORMATS: dict[int, tuple[int, np.dtype[Any]]] = {
    20240520: (1, np.dtype("<u2")),
    20240801: (7, np.dtype("<u4")),
}  # magic -> version, dtype
Array = npt.NDArray[Any]


class Tokens:
    """Token ids of one or more arrays (memmaps as a rule) as one stream. len() is the number of tokens."""

    def __init__(self, parts: Sequence[Array], names: Sequence[str] | None = None) -> None:
        self.parts = list(parts)
        self.names = list(names) if names else [f"array {i}" for i in range(len(self.parts))]
        self._ends = np.cumsum([len(p) for p in self.parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.parts else 0

    def read(self, start: int, n: int) -> Array:
        """Return ids start .. start+n, (n,): a view within one shard, a copy across shards. IndexError past the
        ends."""
        if start < 0 or n < 0 or start + n > len(self):
            raise IndexError(f"tokens {start}..{start + n} of {len(self)}")
        out = [p for _, _, p in self._spans(start, start + n)]
        return out[0] if len(out) == 1 else np.concatenate([np.empty(0, np.uint16), *out])

    def slice(self, start: int, stop: int) -> Tokens:
        """Return ids start .. stop as a new Tokens object, without copying."""
        spans = [(self.names[i], p) for i, _, p in self._spans(start, stop)]
        return Tokens([p for _, p in spans], [name for name, _ in spans])

    def chunks(self, size: int = 1 << 22) -> Iterator[tuple[str, int, Array]]:
        """Yield (file, offset in the part, ids) over all tokens, at most `size` ids at a time."""
        for name, part in zip(self.names, self.parts, strict=True):
            for at in range(0, len(part), size):
                yield name, at, part[at : at + size]

    def check_ids(self, n_vocab: int, limit: int | None = None) -> None:
        """Raise UserError (id, position, file) if an id is >= n_vocab.

        limit: check only about this many ids, in evenly spaced blocks of 64 k; None checks all.
        """
        size = 1 << 16 if limit else 1 << 22
        total = sum(-(-len(p) // size) for p in self.parts)
        step = max(1, total * size // limit) if limit else 1
        for i, (name, at, ids) in enumerate(self.chunks(size)):
            if i % step == 0 and ids.max() >= n_vocab:
                j = int(np.argmax(ids >= n_vocab))
                raise UserError(f"{name} has token id {ids[j]} at position {at + j}; the vocabulary has {n_vocab} ids")

    def fingerprint(self) -> str:
        """Return sha256 over the length and 64 evenly spaced samples of 256 ids: a cheap way to distinguish data
        sets."""
        digest = hashlib.sha256(str(len(self)).encode())
        n = min(256, len(self))
        for i in range(64):
            digest.update(self.read((len(self) - n) * i // 63, n).astype("<u4").tobytes())
        return digest.hexdigest()

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, Array]]:
        """Yield (part index, offset in it, ids) of the parts that start .. stop overlaps."""
        i = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            base = int(self._ends[i]) - len(self.parts[i])
            n = min(stop, int(self._ends[i])) - start
            yield i, start - base, self.parts[i][start - base : start - base + n]
            start, i = start + n, i + 1


def open_tokens(pattern: str | Path, dtype: str | None = None) -> Tokens:
    """Open the shards that a path or glob pattern matches, in natural order (shard_2 before shard_10).

    dtype: "uint16" or "uint32" for raw files; by default uint32 where the file's name has u32 or uint32, else uint16.
    Raises UserError (file, what was found, what was expected) for no match, damaged headers, sizes that do not fit,
    empty files.
    """
    paths = sorted(glob.glob(str(pattern), recursive=True), key=_natural)
    if not paths and os.path.exists(pattern):
        paths = [str(pattern)]  # a real name with glob characters in it
    if not paths:
        raise UserError(f"no token file matches {pattern}")
    return Tokens([_open_shard(Path(p), dtype) for p in paths], paths)


def open_split(
    pattern: str | Path, val: str | Path | None = None, val_fraction: float = 0.05, dtype: str | None = None
) -> tuple[Tokens, Tokens]:
    """Return (train, validation) tokens of shards, without copying.

    Validation is, in this order: the files of `val`; the matches with "val" in their name; the files named like the
    pattern with "val" for "train" (llm.c's and nanoGPT's habit); the last val_fraction of the stream, at most
    10 million tokens. Raises UserError as open_tokens does.
    """
    train = open_tokens(pattern, dtype)
    if val is not None:
        return train, open_tokens(val, dtype)
    held = [re.search(r"(^|[^a-z])val", Path(n).name.lower()) is not None for n in train.names]
    if any(held) and not all(held):
        return _pick(train, [not h for h in held]), _pick(train, held)
    twin = Path(pattern).with_name(Path(pattern).name.replace("train", "val"))
    if twin != Path(pattern) and glob.glob(str(twin)):
        return train, open_tokens(twin, dtype)
    cut = len(train) - min(int(len(train) * val_fraction), 10_000_000)
    return train.slice(0, cut), train.slice(cut, len(train))


def _pick(tokens: Tokens, keep: list[bool]) -> Tokens:
    return Tokens([*compress(tokens.parts, keep)], [*compress(tokens.names, keep)])


class ShardWriter:
    """A writer of one llm.c shard, uint16 for n_vocab <= 65536, else uint32 (or as `dtype` says); a context manager.

    The complete file appears under its name when the block ends, and not at all if the block raises.
    """

    def __init__(self, path: str | Path, n_vocab: int, dtype: str | None = None) -> None:
        self.path, self.n_vocab, self.n_tokens = Path(path), n_vocab, 0
        self._magic = 20240520 if (dtype or dtype_for(n_vocab)) == "uint16" else 20240801
        self._version, self.dtype = FORMATS[self._magic]
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> ShardWriter:
        self._file = self._stack.enter_context(atomic_file(self.path))
        self._file.write(bytes(HEADER_BYTES))
        return self

    def write(self, ids: Array) -> None:
        """Append ids (n,) of any integer dtype. Raises ValueError for an id outside [0, n_vocab)."""
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.n_vocab:
            raise ValueError(f"ShardWriter: ids must be in [0, {self.n_vocab}), got {ids.min()}..{ids.max()}")
        self._file.write(ids.astype(self.dtype, copy=False).tobytes())
        self.n_tokens += len(ids)

    def __exit__(self, *exc: Any) -> None:
        if exc[0] is None:
            header = np.zeros(HEADER_BYTES // 4, "<u4")
            # the count's high half goes into a field that llm.c leaves zero: its own shards stop at 2^31 tokens
            header[:4] = self._magic, self._version, self.n_tokens & 0xFFFFFFFF, self.n_tokens >> 32
            self._file.seek(0)
            self._file.write(header.tobytes())
        self._stack.__exit__(*exc)


def dtype_for(n_vocab: int) -> str:
    """Return the smallest type of ids below n_vocab: uint16 or uint32."""
    return "uint16" if n_vocab <= 1 << 16 else "uint32"


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that appears at `path` complete and synced when the block ends, or not at all.

    Raises UserError if it cannot be written.
    """
    tmp = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(tmp, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from e
    finally:
        tmp.unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    """Return the sha256 of a file. Raises UserError if it cannot be read."""
    try:
        with open(path, "rb") as f:
            digest = hashlib.sha256()
            while block := f.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None


def _open_shard(path: Path, dtype: str | None) -> Array:
    if not path.is_file():
        raise UserError(f"token file {path} is not a file")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"token file {path} is empty")
    with open(path, "rb") as f:
        head = f.read(HEADER_BYTES)
    fields = np.frombuffer(head[: len(head) // 4 * 4], "<u4")
    if len(fields) and int(fields[0]) in FORMATS:
        ids = _open_llmc(path, size, fields)
        if dtype not in (None, ids.dtype.name):
            raise UserError(f"token file {path} has a header that says {ids.dtype.name}, expected {dtype} (data_dtype)")
        return ids
    # a header that is not one of ours would otherwise be read as 512 tokens of nonsense
    if len(fields) == 256 and not fields[4:].any() and fields[0] and size > HEADER_BYTES:
        known = " or ".join(map(str, FORMATS))
        raise UserError(f"token file {path} has a damaged header: magic {fields[0]}, expected {known}")
    wide = re.search(r"u(int)?32", path.name) is not None if dtype is None else _raw_dtype(dtype).itemsize == 4
    kind = np.dtype("<u4" if wide else "<u2")
    if size % kind.itemsize:
        raise UserError(f"token file {path} has {size} bytes, raw {kind.name} ids need a multiple of {kind.itemsize}")
    ids = np.memmap(path, kind, "r")
    if kind.itemsize == 2 and dtype is None and len(ids) >= 64 and not ids[1:4096:2].any() and ids[:4096:2].any():
        raise UserError(
            f"token file {path} looks like uint32 ids (every second 16-bit word is 0): "
            "pass --data-dtype uint32, or --data-dtype uint16 if it is not"
        )
    return ids


def _open_llmc(path: Path, size: int, fields: Array) -> Array:
    magic, version = int(fields[0]), int(fields[1]) if len(fields) > 1 else -1
    expected, kind = FORMATS[magic]
    if len(fields) < HEADER_BYTES // 4:
        raise UserError(f"token file {path} has a truncated header: {size} bytes, expected {HEADER_BYTES}")
    if version != expected:
        raise UserError(f"token file {path} has version {version}, expected {expected} for magic {magic}")
    n = int(fields[2]) | int(fields[3]) << 32
    want = HEADER_BYTES + n * kind.itemsize
    if size != want:
        raise UserError(f"token file {path} has {size} bytes, but its header says {n} tokens, that is {want} bytes")
    if n == 0:
        raise UserError(f"token file {path} holds no tokens")
    ids: Array = np.memmap(path, kind, "r", offset=HEADER_BYTES, shape=(n,))
    return ids


def _raw_dtype(dtype: str) -> np.dtype[Any]:
    if dtype not in ("uint16", "uint32"):
        raise UserError(f"token dtype is {dtype!r}, expected uint16 or uint32")
    return np.dtype(dtype)


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(s), "") if s.isdigit() else (-1, s) for s in re.split(r"(\d+)", path)]
