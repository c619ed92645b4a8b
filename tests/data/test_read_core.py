"""Readers of text and JSON lines: documents, defects with their places, parts."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastgpt.core.errors import UserError
from fastgpt.data.document import Document
from fastgpt.data.read import Defect, DefectError, Format, find_files, open_documents, parts_of

pytest.importorskip("orjson")
zstandard = pytest.importorskip("zstandard")

PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def read(path: Path, **settings: object) -> tuple[list[Document], list[Defect]]:
    """Return the documents and defects of a file, in mode "skip" unless set."""
    found: list[Defect] = []
    format = Format(**{"mode": "skip", **settings})  # type: ignore[arg-type]
    return list(open_documents(path, format, found.append)), found


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(r).encode() + b"\n" for r in records)


@pytest.mark.parametrize("suffix", ["", *PACK])
def test_formats_and_compressions(tmp_path: Path, suffix: str) -> None:
    raw = lines({"text": "one", "n": 7}, {"text": "zwei ä"}, {"text": "three"})
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACK[suffix](raw[:20]) + PACK[suffix](raw[20:]) if suffix else raw)
    documents, defects = read(path)
    assert [d.text for d in documents] == ["one", "zwei ä", "three"] and not defects
    assert documents[1].id == f"a.jsonl{suffix}#{raw.index(b'{', 2)}"
    text = tmp_path / f"a.txt{suffix}"
    body = "\ufeffone<|endoftext|>\n<|endoftext|>two".encode()
    text.write_bytes(PACK[suffix](body) if suffix else body)
    assert [d.text for d in read(text)[0]] == ["one", "two"]


@pytest.mark.parametrize("suffix", PACK)
def test_a_cut_member_is_found(tmp_path: Path, suffix: str) -> None:
    raw = lines(*({"text": f"record {i} {hash(str(i))}"} for i in range(2000)))
    packed = PACK[suffix](raw)
    path = tmp_path / f"a.jsonl{suffix}"
    for keep in (len(packed) - 1, len(packed) * 3 // 4):
        path.write_bytes(packed[:keep])
        documents, defects = read(path)
        assert [d.kind for d in defects] == ["damaged"] and "is cut" in defects[0].problem
        assert all(d.text == f"record {i} {hash(str(i))}" for i, d in enumerate(documents))
        assert defects[0].decompressed and "of the decompressed text" in str(defects[0])
    path.write_bytes(PACK[suffix](raw) + b"garbage at the end")
    documents, defects = read(path)
    assert len(documents) == 2000 and ["other bytes" in d.problem for d in defects] == [True]


def broken() -> Iterator[tuple[bytes, str, int | None, int | None, str]]:
    """Yield one broken record: its bytes, the kind, the line and byte of the defect, part of the message."""
    good = b'{"text": "good"}\n'
    at = len(good)
    yield good + b'{"text": "caf\xe9 cr\xe8me br\xfbl\xe9e, d\xe9j\xe0 vu"}\n', "not UTF-8", 2, at + 13, "0xe9"
    yield good + b'{"text": "a\\u0000b"}\n', "NUL", 2, at, "NUL"
    yield good + b'{"text": "a\0b"}\n', "NUL", 2, at + 11, "NUL"
    yield good + b'{"text": "a\\ud800b"}\n', "lone surrogate", 2, at + 11, "escape of a lone surrogate"
    yield good + b'{"text": "a\xed\xa0\x80b"}\n', "lone surrogate", 2, at + 11, "encoded as if it were UTF-8"
    yield good + b'\n{"text": "half', "broken JSON", 3, at + 10, "unterminated string"
    yield good + b'{"text": NaN}', "broken JSON", 2, at, "NaN is no JSON number"
    yield good + b"[" * 5000, "broken JSON", 2, at, "nested too deeply"
    yield good + b'{"text": "a", "text": "b"}', "key twice", 2, at, "'text' is there twice"
    yield good + b'{"text": "\\":\\":", "a": {"b": 1, "\\u0062": 2}}', "key twice", 2, at, "a key is there twice"
    yield good + b'{"body": "a"}', "missing field", 2, at, "'text' is missing"
    yield good + b'{"text": null}', "missing field", 2, at, "'text' is null"
    yield good + b'{"text": 7}', "wrong type", 2, at, "'text' is a number, expected text"
    yield good + b'{"text": ["a"]}', "wrong type", 2, at, "'text' is a list"
    yield good + b'["a"]', "wrong type", 2, at, "the record is a list"
    yield good + b'{"text": " \\n"}', "empty record", 2, at, "no text"
    yield good + b'{"text": "' + b"x" * 1000 + b'"}', "giant", 2, at, "larger than 500 bytes"


@pytest.mark.parametrize("case", list(broken()), ids=lambda c: c[1])
def test_broken_records(tmp_path: Path, case: tuple[bytes, str, int, int, str]) -> None:
    raw, kind, line, byte, message = case
    path = tmp_path / "a.jsonl"
    for mode in ("skip", "replace"):
        path.write_bytes(raw + b'\n{"text": "last"}')
        max_bytes = 500 if kind == "giant" else 1 << 20
        documents, defects = read(path, mode=mode, max_bytes=max_bytes)
        assert [(d.kind, d.line, d.byte) for d in defects] == [(kind, line, byte)]
        assert message in str(defects[0])
        mended = mode == "replace" and kind in ("not UTF-8", "NUL", "lone surrogate")
        assert [d.text for d in documents if "\ufffd" not in d.text] == ["good", "last"]
        assert len(documents) == 2 + mended
    with pytest.raises(DefectError, match="a.jsonl, line"):
        list(open_documents(path, Format(max_bytes=max_bytes)))


def test_types_are_declared(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"body": "t", "id": "007", "n": 18446744073709551617, "d": "2020-01-01", "f": 1.10, "b": true,'
        b' "o": {"x": -1}}'
    )
    format = Format(text="body", id="id", meta=("n", "d", "f", "b", "o.x", "absent"), license="CC0")
    (document,) = open_documents(path, format)
    meta = {"n": "18446744073709551617", "d": "2020-01-01", "f": "1.10", "b": "true", "o.x": "-1", "license": "CC0"}
    assert (document.id, document.meta, document.source) == ("007", meta, str(path))


@pytest.mark.parametrize("split", ["document", "paragraph", "line", "piece"])
def test_parts_give_the_documents_of_the_whole(tmp_path: Path, split: str) -> None:
    text = "".join(f"line {i}\r\n" + "\n" * (i % 3) + "<|endoftext|>" * (i % 11 == 0) for i in range(500))
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    format = Format(split=split, piece_bytes=100)
    whole = list(open_documents(path, format))
    assert len(whole) > 40
    for size in (1, 200, 1000, 1 << 20):
        parts = parts_of(path, format, size)
        assert parts[0].start == 0 and parts[-1].stop == path.stat().st_size
        assert all(a.stop == b.start for a, b in zip(parts, parts[1:]))
        got = [d for part in parts for d in open_documents(part, format)]
        if split == "piece":
            assert "".join(d.text for d in got).split() == "".join(d.text for d in whole).split()
        else:
            assert [(d.text, d.id) for d in got] == [(d.text, d.id) for d in whole]


def test_lines_of_later_parts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(*({"text": f"t{i}"} for i in range(100))) + b"{broken\n")
    parts = parts_of(path, size=300)
    defects: list[Defect] = []
    list(open_documents(parts[-1], Format(mode="skip"), defects.append))
    assert len(parts) == 6 and (defects[0].line, defects[0].byte) == (101, path.stat().st_size - 7)


def test_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.md", "a/.hidden.txt", ".h/x.txt", "a/b/d.txt.gz", "x.bin", "a/e[1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a/loop").symlink_to(tmp_path / "a")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "twice.txt").symlink_to(tmp_path / "b.txt")
    defects: list[Defect] = []
    found = find_files(tmp_path, Format(mode="skip"), defects.append)
    assert [f.name for f in found.files] == ["a/b/d.txt.gz", "a/c.md", "a/e[1].txt", "b.txt"]
    assert sorted(d.kind for d in defects) == ["broken link", "symlink loop", "symlink loop"]
    assert found.skipped == {"hidden": 2, "of another format": 1, "found twice": 1}
    for pattern, names in {
        "*.txt": ["b.txt"],
        "**/*.txt*": ["a/b/d.txt.gz", "a/e[1].txt", "b.txt"],
        "a/*": ["a/c.md", "a/e[1].txt"],
        "a/.h*": ["a/.hidden.txt"],
        "[!a-b]*/../x.bin": [],
        "a/e[1].txt": ["e[1].txt"],
        "a/[bc].md": ["a/c.md"],
    }.items():
        try:
            got = [f.name for f in find_files(tmp_path / pattern, Format(mode="skip"), lambda d: None).files]
        except UserError:
            got = []
        fixed = "" if "[1]" in pattern or not pattern.startswith("a/") else "a/"
        assert got == [n.removeprefix(fixed) for n in names], pattern
    with pytest.raises(UserError, match="no such file"):
        find_files(tmp_path / "absent")
