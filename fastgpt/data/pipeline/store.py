"""The work folder of a build: results of parts, named by the hash of what they depend on, complete or absent.

    OUT/work/clean/KEY/       one part of a source: chunks of cleaned text, their fingerprints, and report.json
    OUT/work/leaks/KEY/       which documents of a chunk overlap evaluation files
    OUT/work/select/KEY/      which documents of each chunk are kept
    OUT/work/tokens/KEY/      token ids of the kept documents of one chunk
    OUT/work/layout/KEY/      tables of all documents, and the order of the mixture
    OUT/work/next/            the new data set, before it replaces the old one

A folder is written under another name and renamed, so a killed build leaves no incomplete results.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.core.errors import UserError, cause_of
from fastgpt.data.shards import atomic_file

try:
    import fcntl
except ImportError:  # not on Windows: two builds of one data set at a time are then not noticed
    fcntl = None  # type: ignore[assignment]

VERSION = 1  # of everything in the work folder
ALL = 1 << 64  # number of values of hash64


def key_of(*facts: Any) -> str:
    """Return the name of a result: a hash of the plain values it depends on."""
    return hashlib.sha256(json.dumps([VERSION, *facts], sort_keys=True).encode()).hexdigest()[:32]


def hash64(*parts: str) -> int:
    """Return a 64-bit hash of strings, the same on every machine."""
    joined = "\0".join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "little")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, complete or not at all. Raises UserError if it cannot be written."""
    with atomic_file(path) as f:
        f.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


def read_json(path: Path) -> Any:
    """Return the content of a JSON file that a build wrote; None if it is missing. Raises UserError if damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is damaged ({cause_of(e)}); delete it and build again") from None


@contextlib.contextmanager
def new_result(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into, which becomes `folder` when the block ends, and is removed if it raises.

    If another worker has written the same result in the meantime, that one stays.
    Raises UserError if it cannot be written.
    """
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.partial")  # ids of processes repeat on machines
    try:
        aside.mkdir(parents=True)
        yield aside
        if not folder.exists():
            os.rename(aside, folder)
    except OSError as e:
        if not folder.exists():
            raise UserError(f"cannot write {folder}: {e.strerror or e}") from e
    finally:
        shutil.rmtree(aside, ignore_errors=True)


# at, bytes: place in text.bin; id_at, id_bytes: place in ids.bin; hash: of seed, source and id
DOCUMENT = np.dtype([("at", "<i8"), ("bytes", "<i8"), ("id_at", "<i8"), ("id_bytes", "<i4"), ("hash", "<u8")])


@dataclass(frozen=True)
class Chunk:
    """Cleaned documents of one part and one split, up to about a part's size: the unit of the later stages.

    Files in its folder: text.bin (UTF-8, without separators), ids.bin (UTF-8), documents.npy ((n,) of DOCUMENT), and
    the fingerprints for deduplication, if it is on.

    Attributes:
        key: name of the chunk's content: the part's key and the chunk's name in it.
        held: whether the documents are held out for validation.
    """

    source: str
    folder: Path
    key: str
    held: bool
    documents: int
    bytes: int

    def table(self) -> npt.NDArray[Any]:
        """Return documents.npy: (n,) of DOCUMENT."""
        table: npt.NDArray[Any] = np.load(self.folder / "documents.npy")
        return table

    def ids(self) -> list[str]:
        """Return the ids of all documents."""
        raw = (self.folder / "ids.bin").read_bytes()
        table = self.table()
        return [raw[at : at + n].decode() for at, n in zip(table["id_at"], table["id_bytes"], strict=True)]

    def texts(self, rows: npt.NDArray[Any] | None = None, size: int = 1 << 22) -> Iterator[list[str]]:
        """Yield the texts of the given rows (default: all) in order, in batches of about `size` bytes."""
        table = self.table()
        batch: list[str] = []
        held = 0
        with open(self.folder / "text.bin", "rb") as f:
            for row in range(len(table)) if rows is None else rows:
                f.seek(table["at"][row])
                batch.append(f.read(table["bytes"][row]).decode())
                held += int(table["bytes"][row])
                if held >= size:
                    yield batch
                    batch, held = [], 0
        if batch:
            yield batch


class ChunkWriter:
    """Writes documents into folders PREFIX0000, ... of at most about `size` bytes of text. A context manager.

    on_full: called with each finished folder and the texts in it.
    """

    def __init__(self, stem: Path, size: int, on_full: Callable[[Path, list[str]], None]) -> None:
        self.stem, self.size, self.on_full = stem, size, on_full
        self.done: list[dict[str, Any]] = []  # name, documents and bytes of each chunk
        self._clear()

    def _clear(self) -> None:
        self._rows: list[tuple[int, int, int, int, int]] = []
        self._texts: list[str] = []
        self._ids: list[bytes] = []
        self._at = self._id_at = 0

    def __enter__(self) -> ChunkWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._flush()

    def add(self, text: str, identity: str, digest: int) -> None:
        """Append a document."""
        size, name = len(text.encode()), identity.encode("utf-8", "backslashreplace")
        self._rows.append((self._at, size, self._id_at, len(name), digest))
        self._texts.append(text)
        self._ids.append(name)
        self._at += size
        self._id_at += len(name)
        if self._at >= self.size:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        place = self.stem.with_name(f"{self.stem.name}{len(self.done):04}")
        place.mkdir()
        with open(place / "text.bin", "wb") as f:
            f.writelines(text.encode() for text in self._texts)
        (place / "ids.bin").write_bytes(b"".join(self._ids))
        np.save(place / "documents.npy", np.array(self._rows, DOCUMENT))
        self.on_full(place, self._texts)
        self.done.append({"name": place.name, "documents": len(self._rows), "bytes": self._at})
        self._clear()


@contextlib.contextmanager
def locked(work: Path, alone: bool) -> Iterator[None]:
    """Hold the lock of a work folder: `alone` for a whole build, shared for tasks that each do some of its parts.

    Raises UserError if another build holds it.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / "lock", "a")
    except OSError as e:
        raise UserError(f"cannot write {work}: {e.strerror}") from e
    with lock:
        try:
            if fcntl is not None:
                fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another build is working in {work}; wait until it ends") from None
        try:
            yield
        finally:
            if alone and not has_results(work):
                with contextlib.suppress(OSError):
                    (work / "lock").unlink(missing_ok=True)
                    work.rmdir()
                    work.parent.rmdir()  # unless a data set is there


def has_results(work: Path) -> bool:
    """Return whether a work folder holds more than its lock."""
    return work.is_dir() and any(path.name != "lock" for path in work.iterdir())


@contextlib.contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Wait until no other process holds this lock, and hold it."""
    with open(path, "a") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove_partial(work: Path) -> None:
    """Remove what killed workers left behind. Only for who holds the lock alone."""
    for folder in ("clean", "leaks", "select", "tokens", "layout", "next"):
        for old in (work / folder).glob(".*.partial"):
            # first renamed: a task that still runs on another machine then cannot complete a half-removed folder
            gone = old.with_suffix(".removed")
            with contextlib.suppress(OSError):
                old.rename(gone)
        for gone in (work / folder).glob(".*.removed"):
            shutil.rmtree(gone, ignore_errors=True) if gone.is_dir() else gone.unlink(missing_ok=True)
