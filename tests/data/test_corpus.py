import codecs
import os
from pathlib import Path

import pytest

from fastgpt.core.errors import UserError
from fastgpt.data import default_corpus, read_text, read_texts, split_files, text_files
from fastgpt.data.corpus import documents

from .conftest import sentences


def error(call, *args) -> str:
    with pytest.raises(UserError) as e:
        call(*args)
    return str(e.value)


def test_default_corpus_is_python_source_without_tests():
    corpus = default_corpus()
    names = [f.name for f in corpus.files]
    assert names == sorted(names) and len(names) > 200 and corpus.bytes > 5_000_000
    assert all(n.endswith(".py") for n in names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    banned = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
    assert not [n for n in names if banned & set(n.split("/"))]
    assert default_corpus() == corpus


def test_files_come_in_name_order_without_binary_hidden_empty_and_copied_ones(folder: Path):
    (folder / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\r")
    (folder / ".hidden.txt").write_text("x")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("y")
    (folder / "empty.txt").write_text(" \n")
    (folder / "z_copy.txt").write_bytes((folder / "a00.txt").read_bytes())
    corpus = text_files(folder)
    assert [f.name for f in corpus.files] == [f"a{i:02}.txt" for i in range(29)] + ["deep/b.py"]
    assert corpus.skipped == ["image.png", "z_copy.txt"]
    assert dict(read_texts(folder))["a03.txt"] == sentences(40, 3)


def test_text_is_read_as_it_is_but_for_the_byte_order_mark(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_bytes(codecs.BOM_UTF8 + "é\r\nb\rc\n".encode())
    assert read_text(file) == "é\r\nb\rc\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"ab\ncd\xff\n", "not UTF-8: byte 0xff at line 2, byte 5"),
        (codecs.BOM_UTF8 + b"ab\n\xe9t\xe9\n", "not UTF-8: byte 0xe9 at line 2, byte 6"),
        (b"ok\n\xe2\x82", "byte 0xe2 at line 2, byte 3 (unexpected end of data)"),
        (b"ab\n\ncd\0\n", "is not text: NUL at line 3, byte 6"),
        ("hi".encode("utf-16"), "UTF-16 byte-order mark at line 1, byte 0"),
        (codecs.BOM_UTF32_LE + b"h\0\0\0", "UTF-32 byte-order mark"),
    ],
)
def test_what_is_not_utf8_is_named_with_line_and_byte(tmp_path: Path, content: bytes, said: str):
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    message = error(read_text, file)
    assert str(file) in message and said in message


def test_bad_paths_are_named(tmp_path: Path):
    assert error(text_files, tmp_path / "no") == f"data path {tmp_path / 'no'} does not exist"
    (tmp_path / "empty.txt").write_bytes(codecs.BOM_UTF8 + b"\n")
    assert error(text_files, tmp_path / "empty.txt") == f"data file {tmp_path / 'empty.txt'} is empty"
    (tmp_path / "sub").mkdir()
    assert error(text_files, tmp_path / "sub") == f"folder {tmp_path / 'sub'} holds no text files"
    (tmp_path / "sub" / "x.bin").write_bytes(b"a\0b")
    assert "holds no text files (1 binary file left out)" in error(text_files, tmp_path / "sub")
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in error(text_files, tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_named(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    assert error(text_files, tmp_path / "a.txt") == f"cannot read {tmp_path / 'a.txt'}: Permission denied"


def test_split_takes_whole_files_and_depends_on_names_alone(folder: Path):
    files = text_files(folder).files
    train, val = split_files(files)
    assert all(p.start == 0 and p.stop is None for p in train + val)
    assert sorted(p.file.name for p in train + val) == [f.name for f in files]
    assert 1 <= len(val) <= 2
    assert split_files(list(reversed(files)))[1] == val
    (folder / "a00.txt").write_text(sentences(40, 1234), encoding="utf-8")
    assert {p.file.name for p in split_files(text_files(folder).files)[1]} == {p.file.name for p in val}


@pytest.mark.parametrize("fraction", [0.05, 0.2])
def test_held_out_share_of_the_default_corpus(fraction: float):
    files = default_corpus().files
    train, val = split_files(files, fraction)
    share = sum(p.file.size for p in val) / sum(f.size for f in files)
    assert 0.8 * fraction < share <= fraction
    assert not {p.file.sha256 for p in train} & {p.file.sha256 for p in val}


@pytest.mark.parametrize("mark", ["<|endoftext|>", "\n\n", "\n", " ", ""])
def test_single_file_is_cut_near_its_end_at_the_strongest_boundary(tmp_path: Path, mark: str):
    file = tmp_path / "one.txt"
    file.write_text(mark.join(["x" * 97] * 100) if mark else "é" * 9700, encoding="utf-8")
    train, val = split_files(text_files(file).files)
    a, b = train[0].text(), val[0].text()
    assert a + b == read_text(file)
    assert a.endswith(mark) and 0.02 < len(b) / len(a + b) <= 0.05


def test_a_file_that_outweighs_the_rest_is_cut_instead_of_held_out(tmp_path: Path):
    (tmp_path / "big.txt").write_text(sentences(2000), encoding="utf-8")
    (tmp_path / "small.txt").write_text("little\n")
    train, val = split_files(text_files(tmp_path).files)
    assert [p.file.name for p in val] == ["big.txt"] and len(train) == 2
    assert 0.03 < len(val[0].text()) / len(train[0].text()) < 0.07


def test_too_little_text_to_split(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    message = error(split_files, text_files(tmp_path / "a.txt").files)
    assert "a.txt has 1 characters, too few" in message
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 0.5\], got 0.6"):
        split_files(text_files(tmp_path / "a.txt").files, 0.6)


def test_documents_are_what_stands_between_marks():
    assert documents("a\n<|endoftext|>\n<|endoftext|>b") == ["a\n", "b"]
