"""The store: what is added is found, a user can be exported and forgotten, and a kill at any point loses nothing."""

from __future__ import annotations

import json
import os
import stat
import threading
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from fastgpt.core.errors import UserError
from fastgpt.serve.watch.store import Store
from fastgpt.serve.watch.store_command import main


def record(store: Store, id: str, user: str | None, **more: Any) -> dict[str, Any]:
    return {"id": id, "user": None if user is None else store.hash(user), "flags": [], **more}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", create=True)


def test_records_are_found_and_private(store: Store) -> None:
    first, second = record(store, "a", "ann", answer="x\ny"), record(store, "b", None)
    store.add(first, second)
    store.add(record(store, "c", "bob"), kind="feedback")
    assert store.find("a") == first and store.find("b") == second
    assert store.find("c") is None and store.find("c", kind="feedback") is not None
    assert [r["id"] for r in store.records()] == ["a", "b", "c"] and len(list(store.records("answers"))) == 2
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in [store.folder / "key", *store.folder.glob("*.jsonl")]} == {0o600}
    assert "ann" not in "".join(p.read_text() for p in store.folder.glob("*.jsonl"))
    again, other = Store(store.folder), Store(store.folder.parent / "other", create=True)
    assert again.hash("ann") == store.hash("ann") != other.hash("ann")


def test_forget_deletes_one_user_from_every_kind(store: Store) -> None:
    store.add(record(store, "a", "ann"), record(store, "b", "bob", answer=json.dumps({"user": store.hash("ann")})))
    store.add({"pair": {"chosen": record(store, "a", "ann")}}, kind="feedback")
    assert len(store.export("ann")) == 2 and [r["id"] for r in store.export("bob")] == ["b"]
    assert store.forget("ann") == 2 and store.forget("nobody") == 0
    assert [r["id"] for r in store.records()] == ["b"] and store.export("ann") == []
    assert [d["records"] for d in store.deletions] == [2, 0] and set(store.deletions[0]) == {"time", "records"}
    hashed = store.hash("ann").encode()
    files = [p for p in store.folder.iterdir() if p.is_file() and p.name != "key"]
    assert not [p.name for p in files if b'"' + hashed + b'"' in p.read_bytes()]


@pytest.mark.parametrize("after", range(1, 9))
def test_killed_while_it_forgets(store: Store, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """End the process at each of its replacements and syncs: nobody else's record is lost, and the next start of any
    command finishes the work."""
    for kind in ("answers", "feedback"):
        store.add(record(store, "a", "ann"), record(store, "b", "bob"), kind=kind)

    pid = os.fork()
    if pid == 0:
        calls = 0
        real = os.fsync

        def counted(handle: int) -> None:
            nonlocal calls
            calls += 1
            if calls == after:
                os._exit(9)
            real(handle)

        monkeypatch.setattr(os, "fsync", counted)
        store.forget("ann")
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == (9 if after <= 7 else 0)
    assert [r["id"] for r in store.records()].count("b") == 2
    again = Store(store.folder)
    assert [r["id"] for r in again.records()] == ["b", "b"] and again.export("ann") == []
    assert not list(store.folder.glob("*.tmp")) and not (store.folder / "forgetting").exists()


def test_a_line_that_was_cut_off_is_removed(store: Store) -> None:
    store.add(record(store, "a", None))
    ((path, _),) = store.files()
    with path.open("ab") as f:
        f.write(b'{"id": "torn", "answer": "' + b"x" * 100_000)
    assert [r["id"] for r in store.records()] == ["a"]
    store.add(record(store, "b", None))
    assert [r["id"] for r in store.records()] == ["a", "b"] and b"torn" not in path.read_bytes()
    path.write_bytes(b"not JSON\n" + path.read_bytes())
    assert [r["id"] for r in store.records()] == ["a", "b"]


def test_writers_and_a_command_at_the_same_time(store: Store) -> None:
    def write(name: str) -> None:
        own = Store(store.folder)
        for i in range(40):
            own.add(record(own, f"{name}{i}", name))

    threads = [threading.Thread(target=write, args=(name,)) for name in ("ann", "bob")]
    for thread in threads:
        thread.start()
    Store(store.folder).forget("ann")
    for thread in threads:
        thread.join()
    store.forget("ann")
    assert sorted(r["id"] for r in store.records()) == sorted(f"bob{i}" for i in range(40))


def test_records_expire(store: Store) -> None:
    today = date(2026, 3, 10)
    for ago in (0, 6, 7, 8):
        (store.folder / f"answers-{today - timedelta(days=ago)}.jsonl").write_text('{"id": "x"}\n')
    (store.folder / "answers-2026-99-99.jsonl").write_text("")
    assert store.expire(7, today) == 2
    assert [today - day for _, day in store.files()] == [timedelta(days=6), timedelta(0)]


def test_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a store, expected a folder that"):
        Store(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="has other files, expected a store, or a new or empty folder"):
        Store(tmp_path, create=True)
    with pytest.raises(UserError, match="cannot be used as a store"):
        Store(tmp_path / "file" / "below", create=True)


def test_the_command(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.describe(keep_texts=True, keep_days=30)
    store.add(record(store, "a", "ann", answer="hello") | {"flags": ["rude"]}, record(store, "b", None))
    where, out = str(store.folder), store.folder.parent / "ann.jsonl"
    assert main(["show", where]) == 0
    shown = capsys.readouterr().out
    assert "prompts and answers; each record for at most 30 days" in shown and "hello" not in shown
    assert "in all: 2 records, 1 user" in shown and "flag rude: 1 record" in shown
    assert main(["export", where, "--user", "ann"]) == 0 and json.loads(capsys.readouterr().out)["answer"] == "hello"
    assert main(["export", where, "--user", "ann", "--out", str(out)]) == 0 and len(out.read_text().splitlines()) == 1
    assert main(["forget", where, "--user", "ann"]) == 0 and main(["show", where]) == 0
    assert "forgotten: 1 record at " in capsys.readouterr().out
    assert main(["expire", where, "--keep-days", "1"]) == 0 and capsys.readouterr().out == "deleted: 0 files\n"
    with pytest.raises(UserError, match="--user"):
        main(["forget", where])
