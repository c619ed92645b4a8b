"""`fastgpt data validate`: every broken file has its own message, exit codes, --json."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pytest

from fastgpt import cli
from fastgpt.data.read import Defect, Format, files, open_documents, reading, streams

pytest.importorskip("orjson")

SECRET = "s3cret"
BROKEN: dict[str, tuple[bytes, str]] = {
    "latin.txt": ("schöne Grüße aus Köln, déjà vu".encode("latin-1"), "line 1, byte 3: byte 0xf6 is not UTF-8"),
    "utf16.txt": (SECRET.encode("utf-16"), "line 1, byte 0: the file begins with the byte-order mark of UTF-16"),
    "bare16.txt": (SECRET.encode("utf-16-le") * 20, "UTF-16 without a byte-order mark"),
    "nul.txt": (f"a\n{SECRET}\0".encode(), "line 2, byte 8: the text holds a NUL"),
    "surrogate.jsonl": (b'{"text": "a\\udc00"}\n', "line 1, byte 11: the JSON holds the escape of a lone surrogate"),
    "half.jsonl": (
        f'{{"text": "a"}}\n{{"text": "{SECRET}'.encode(),
        "line 2, byte 23: the JSON is broken: unterminated string at column 10; repair",
    ),
    "mixed.jsonl": (b'{"text": "a"}\n{"text": 7}\n', "line 2, byte 14: field 'text' is a number, expected text"),
    "binary.txt": (bytes(range(256)) * 8, "the file is binary"),
    "image.md": (b"\x89PNG\r\n\x1a\n" + bytes(50), "the file is a PNG image"),
    "named.txt": (gzip.compress(b"text"), "the file is gzip data, expected text; add .gz to its name"),
    "empty.txt": (b"", "empty.txt: the file is empty"),
    "blank.txt": (b" \n\n", "holds only white space"),
    "cut.txt.gz": (gzip.compress(b"text " * 500)[:-9], "cut: the member that begins at byte 0"),
    "cut.jsonl.bz2": (bz2.compress(b'{"text": "a"}\n')[:-2], "the bzip2 data is cut"),
    "cut.jsonl.xz": (lzma.compress(b'{"text": "a"}\n')[:-2], "the xz data is cut"),
    "not.txt.gz": (b"plain text", "the file is not gzip data or is damaged"),
    "quote.csv": (b'text\n"a\n', "line 2, byte 5: the row is broken: unexpected end of data"),
    "short.warc": (b"WARC/1.0\r\nContent-Length: 9\r\n\r\nab", "shorter than its Content-Length of 9"),
    "not.parquet": (b"x" * 100, "the parquet data is cut or damaged"),
}


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr("sys.argv", ["fastgpt", "data", "validate", *argv])
    return cli.main()


def test_every_broken_file_has_its_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow")
    for name, (raw, _) in BROKEN.items():
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    assert run(monkeypatch, str(tmp_path)) == 1
    lines = capsys.readouterr().out.splitlines()
    for name, (_, message) in BROKEN.items():
        found = [line for line in lines if line.startswith(f"{tmp_path}/{name}")]
        assert len(found) == 1 and message in found[0], (name, found)
    assert any("loop.txt: is a link that leads back to itself" in line for line in lines)
    assert SECRET not in "".join(lines) and len(lines) == len(BROKEN) + 2
    messages = [line.split(": ", 1)[1] for line in lines[:-1]]
    assert len(set(messages)) == len(messages)


def test_encoding_is_guessed(tmp_path: Path) -> None:
    pytest.importorskip("charset_normalizer")
    text = "Съешь же ещё этих мягких французских булок, да выпей чаю. Широкая электрификация южных губерний."
    for encoding, name in (("cp1251", "CP1251"), ("shift_jis", None)):
        (tmp_path / "a.txt").write_bytes(
            (text if name else "これは日本語の文章です。東京は日本の首都。").encode(encoding)
        )
        found: list[Defect] = []
        list(open_documents(tmp_path / "a.txt", Format(mode="skip"), found.append))
        guess = found[0].remedy.partition("iconv -f ")[2].partition(" ")[0]
        assert guess == name if name else guess in ("SHIFT-JIS", "CP932", "SHIFT-JIS-2004", "SHIFT-JISX0213")


def test_exit_codes_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "a", "n": 1}\n{"body": "b"}\n')
    assert run(monkeypatch, str(path), "--text", "body", "--meta", "n") == 0
    assert capsys.readouterr().out == "1 file, 0.0 MB, 2 documents: no defects\n"
    assert run(monkeypatch, str(path), "--json", "--limit", "1") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["count"], len(found["defects"]), found["kinds"]) == (2, 1, {"missing field": 2})
    assert found["defects"][0]["line"] == 1
    for argv, message in (
        ([str(tmp_path / "absent")], "there is no such file or folder"),
        ([str(path), "--format", "docx"], "invalid choice: 'docx'"),
        ([str(tmp_path / "*.csv")], "has no files to read"),
        ([str(path), "--delimiter", "ab"], "expected one character"),
        ([], "the following arguments are required: PATH"),
    ):
        assert run(monkeypatch, *argv) == 2
        assert message in capsys.readouterr().err


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as root, who may read all; so the system call is replaced."""
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "folder").mkdir()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    found: list[Defect] = []
    with monkeypatch.context() as m:
        m.setattr(streams, "open", refuse, raising=False)
        assert not list(open_documents(tmp_path / "a.txt", Format(mode="skip"), found.append))
    scandir = os.scandir
    with monkeypatch.context() as m:
        m.setattr(files.os, "scandir", lambda p: refuse() if str(p).endswith("folder") else scandir(p))
        assert len(files.find_files(tmp_path, Format(mode="skip"), found.append).files) == 1
    assert ["no permission" in d.problem and "chmod +r" in d.remedy for d in found] == [True, True]


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, package in (("a.jsonl", "orjson"), ("a.txt.zst", "zstandard"), ("a.parquet", "pyarrow")):
        (tmp_path / name).write_bytes(b"x")
        with monkeypatch.context() as m:
            for module in (package, f"{package}.parquet"):
                m.setitem(__import__("sys").modules, module, None)
            assert run(m, str(tmp_path / name)) == 2
        error = capsys.readouterr().err
        assert f"needs {package}, which is not installed: pip install" in error and error.count("\n") == 1
    pytest.importorskip("charset_normalizer")
    for text, encoding in (
        ("caf\xe9", "cp1252"),
        ("\u201cGr\xf6\xdfe\u201d \u2013 sch\xf6n", "cp1252"),
        ("Привет, как дела?", "cp1251"),
    ):
        assert reading.guess_encoding(text.encode(encoding)) == encoding.upper()
    monkeypatch.setitem(__import__("sys").modules, "charset_normalizer", None)
    assert reading.guess_encoding(b"caf\xe9") == ""
