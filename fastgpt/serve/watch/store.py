"""Records that a server keeps, as JSON lines in a folder, in one file for each kind and day (UTC).

    key                     makes the hashes of users, mode 600; without it no user can be found again
    store.json              what the server keeps, and for how long
    lock                    held while files are written, by the server and by `fastgpt store`
    KIND-YYYY-MM-DD.jsonl   records, such as answers-2026-11-30.jsonl; a user is a hash, anywhere in a record
    forgetting              the hash of a user who is being forgotten; whoever opens the store next finishes that
    deletions.jsonl         when users were forgotten, and how many records they had; nothing else

A process that is killed loses nothing that `add` has returned from: files are appended and synced, a line without its
end is removed before the next one is written, and a file is replaced by one that was written aside.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from fastgpt.core.errors import UserError, cause_of
from fastgpt.core.folders import write_text
from fastgpt.data.pipeline.store import in_turn

DAY = re.compile(r"(.+)-(\d{4}-\d\d-\d\d)\.jsonl")
KEY, ABOUT, DELETIONS, PENDING = "key", "store.json", "deletions.jsonl", "forgetting"
HASH = 32  # hex digits of a user's hash
Record = dict[str, Any]


def now() -> str:
    """Return the time (UTC) for a record."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class Store:
    """A folder of records.

    Args:
        folder: of the store.
        create: make it if there is none.

    Raises:
        UserError: there is no store, something else is there, or it cannot be written.
    """

    def __init__(self, folder: str | Path, create: bool = False) -> None:
        self.folder = Path(folder)
        key = self.folder / KEY
        try:
            if create and not key.is_file():
                self._create(key)
            if not key.is_file():
                raise UserError(f"{folder} is not a store, expected a folder that `fastgpt serve --store` wrote to")
            self._key = bytes.fromhex(key.read_text(encoding="ascii"))
            with self._locked():
                self._finish_forgetting()
        except (OSError, ValueError) as e:
            raise UserError(f"{folder} cannot be used as a store ({cause_of(e)})") from None

    def _create(self, key: Path) -> None:
        if self.folder.is_dir() and any(p.name != "lock" for p in self.folder.iterdir()):
            raise UserError(f"{self.folder} has other files, expected a store, or a new or empty folder")
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._locked():
            if not key.is_file():  # another process may have been faster
                aside = key.with_name(".key.tmp")
                aside.unlink(missing_ok=True)
                with _private(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as f:
                    f.write(secrets.token_hex(32).encode())
                aside.replace(key)
                _sync_folder(self.folder)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with in_turn(self.folder / "lock"):
            yield

    @property
    def about(self) -> Record:
        """What the server keeps, as it wrote it last; empty if it never ran."""
        file = self.folder / ABOUT
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}

    def describe(self, **about: Any) -> None:
        """Write what the server keeps."""
        with self._locked():
            write_text(self.folder / ABOUT, json.dumps(about) + "\n")

    def hash(self, user: str) -> str:
        """Return the keyed hash that stands for a user: HMAC-SHA256, 32 hex digits."""
        return hmac.new(self._key, user.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:HASH]

    def add(self, *records: Record, kind: str = "answers") -> None:
        """Append records and wait until they are on the disk.

        Raises:
            OSError: they cannot be written.
        """
        lines = b"".join(json.dumps(record).encode() + b"\n" for record in records)
        with self._locked():
            path = self.folder / f"{kind}-{datetime.now(timezone.utc).date()}.jsonl"
            new = not path.exists()
            with _private(path, os.O_RDWR | os.O_CREAT) as f:
                f.seek(_end_of_lines(f))
                f.truncate()
                f.write(lines)
            if new:
                _sync_folder(self.folder)

    def files(self, kind: str | None = None) -> list[tuple[Path, date]]:
        """Return the files of one kind, or of all, with their days, oldest first."""
        found = []
        for path in self.folder.glob("*.jsonl"):
            match = DAY.fullmatch(path.name)
            if match and kind in (None, match[1]):
                with suppress(ValueError):
                    found.append((path, date.fromisoformat(match[2])))
        return sorted(found, key=lambda pair: (pair[1], pair[0].name))

    def records(self, kind: str | None = None) -> Iterator[Record]:
        """Yield the records of one kind, or of all, oldest first. Damaged lines are skipped."""
        for path, _ in self.files(kind):
            for line in _lines(path):
                yield from _parsed(line)

    def find(self, id: str, kind: str = "answers", index: int = 0) -> Record | None:
        """Return the newest record with an id, of the choice with this index."""
        needle = json.dumps(id).encode()
        for path, _ in reversed(self.files(kind)):
            for line in reversed(_lines(path)):
                found = next(_parsed(line), {}) if needle in line else {}
                if found.get("id") == id and found.get("index", 0) == index:
                    return found
        return None

    def export(self, user: str) -> list[Record]:
        """Return every record of a user, oldest first."""
        needle = _needle(self.hash(user))
        return [r for path, _ in self.files() for line in _lines(path) if needle in line for r in _parsed(line)]

    def forget(self, user: str) -> int:
        """Delete every record of a user, in whichever kind of file; return how many there were.

        Raises:
            OSError: a file cannot be written. Forget again, or open the store, to finish.
        """
        with self._locked():
            with _private(self.folder / PENDING, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as f:
                f.write(self.hash(user).encode())
            _sync_folder(self.folder)
            return self._finish_forgetting()

    def _finish_forgetting(self) -> int:
        """Forget the user in the file `forgetting`, if there is one; return how many records were deleted."""
        pending = self.folder / PENDING
        for old in self.folder.glob("*.jsonl.tmp"):
            old.unlink()
        user = pending.read_text(encoding="ascii") if pending.is_file() else ""
        if len(user) != HASH:  # killed before it was written whole
            pending.unlink(missing_ok=True)
            return 0
        deleted = sum(_drop(path, _needle(user)) for path, _ in self.files())
        _sync_folder(self.folder)
        with _private(self.folder / DELETIONS, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as f:
            f.write(json.dumps({"time": now(), "records": deleted}).encode() + b"\n")
        pending.unlink()
        _sync_folder(self.folder)
        return deleted

    def expire(self, days: int, today: date | None = None) -> int:
        """Delete files so that no record is kept for more than `days` days; return how many files."""
        first = (today or datetime.now(timezone.utc).date()) - timedelta(days=days)
        with self._locked():
            self._finish_forgetting()  # of a command that was killed
            old = [path for path, day in self.files() if day <= first]
            for path in old:
                path.unlink()
        return len(old)

    @property
    def deletions(self) -> list[Record]:
        """The times at which users were forgotten, and the numbers of their records."""
        path = self.folder / DELETIONS
        return [r for line in _lines(path) for r in _parsed(line)] if path.is_file() else []


def _needle(user: str) -> bytes:
    """Return what a line has that holds this hash as a value; a text that quotes it has its quotes escaped."""
    return json.dumps(user).encode()


def _lines(path: Path) -> list[bytes]:
    """Return the complete lines of a file; none if it has been deleted."""
    with suppress(FileNotFoundError):
        return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return []


def _parsed(line: bytes) -> Iterator[Record]:
    with suppress(ValueError):
        found = json.loads(line)
        if isinstance(found, dict):
            yield found


@contextmanager
def _private(path: Path, flags: int) -> Iterator[Any]:
    """Open a file that its owner alone may read, and sync it."""
    mode = "r+b" if flags & os.O_RDWR else "wb" if not flags & os.O_APPEND else "ab"
    with os.fdopen(os.open(path, flags, 0o600), mode) as f:
        yield f
        f.flush()
        os.fsync(f.fileno())


def _drop(path: Path, needle: bytes) -> int:
    """Replace a file by one without the lines that have the needle; return how many those are."""
    lines = _lines(path)
    kept = [line for line in lines if needle not in line]
    if len(kept) < len(lines):
        aside = path.with_name(path.name + ".tmp")
        with _private(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as f:
            f.write(b"".join(kept))
        aside.replace(path)
    return len(lines) - len(kept)


def _end_of_lines(f: Any) -> int:
    """Return where the last complete line of a file ends."""
    at = f.seek(0, os.SEEK_END)
    while at:
        start = max(0, at - 65536)
        f.seek(start)
        cut = f.read(at - start).rfind(b"\n")
        if cut >= 0:
            return start + cut + 1
        at = start
    return 0


def _sync_folder(folder: Path) -> None:
    """Wait until new and renamed files of a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
