"""Readers of JSON, csv, parquet, HTML, WARC, MediaWiki and StackExchange, on small files made here."""

from __future__ import annotations

import datetime
import gzip
from pathlib import Path

import pytest
from data_samples import CODE, PAGE, POSTS, WIKI, http, warc

from fastgpt.core.errors import UserError
from fastgpt.data.document import Document
from fastgpt.data.read import Defect, Format, open_documents
from fastgpt.data.read.wikitext import plain_text

pytest.importorskip("orjson")


def read(path: Path, raw: bytes, **settings: object) -> tuple[list[Document], list[Defect]]:
    """Write a file and return its documents and defects, in mode "skip" unless set."""
    path.write_bytes(raw)
    found: list[Defect] = []
    format = Format(**{"mode": "skip", **settings})  # type: ignore[arg-type]
    return list(open_documents(path, format, found.append)), found


def brief(defects: list[Defect]) -> list[tuple[str, int | None, int | None]]:
    return [(d.kind, d.line, d.byte) for d in defects]


@pytest.mark.parametrize(
    "raw",
    [
        b'[{"text": "a"},\n {"text": "b ]}\\" [", "x": [1, {"y": 2}]}, {"text": "c"}]\n',
        b'\xef\xbb\xbf{"text": "a"}{"text": "b ]}\\" ["}\n\n{"text":\n"c"}',
    ],
)
def test_json(tmp_path: Path, raw: bytes) -> None:
    documents, defects = read(tmp_path / "a.json", raw)
    assert [(d.text, d.id) for d in documents] == [("a", "a.json#0"), ('b ]}" [', "a.json#1"), ("c", "a.json#2")]
    assert not defects


@pytest.mark.parametrize(
    "raw, kind, byte, texts",
    [
        (b'[{"text": "a"}, {"text": "b"', "broken JSON", 28, "a"),
        (b'[{"text": "a"} {"text": "b"}]', "broken JSON", 14, "ab"),
        (b'[{"text": "a"}, ]', "broken JSON", 14, "a"),
        (b'[{"text": "a"}] x', "broken JSON", 15, "a"),
        (b'[{"text": "a"}, {"text": }, {"text": "c"}]', "broken JSON", 25, "ac"),
        (b'["a"]', "broken JSON", 1, ""),
        (b" \n", "empty file", 0, ""),
        (b'{"text": "' + b"x" * 200 + b'"}', "giant", 0, ""),
    ],
)
def test_broken_json(tmp_path: Path, raw: bytes, kind: str, byte: int, texts: str) -> None:
    documents, defects = read(tmp_path / "a.json", raw, max_bytes=100)
    assert brief(defects) == [(kind, 1, byte)] and "".join(d.text for d in documents) == texts


def test_csv(tmp_path: Path) -> None:
    raw = b'id,text,extra\r\n007,"two\nlines, ""quoted""",\r\n\r\n18446744073709551617,plain,2020-01-01\r\n'
    documents, defects = read(tmp_path / "a.csv", raw, id="id", meta="extra")
    assert [(d.id, d.text, d.meta["extra"]) for d in documents] == [
        ("007", 'two\nlines, "quoted"', ""),
        ("18446744073709551617", "plain", "2020-01-01"),
    ]
    assert not defects
    documents, _ = read(tmp_path / "b.tsv", b"x\ta,b\ny\tc\n", columns=("id", "text"))
    assert [d.text for d in documents] == ["a,b", "c"]


@pytest.mark.parametrize(
    "raw, expected, texts",
    [
        (b"id,text\n1,a\n2\n3,c\n", ("broken CSV", 3, 12), "ac"),
        (b'id,text\n1,a\n2,"b"x\n3,c\n', ("broken CSV", 3, 12), "ac"),
        (b'id,text\n1,a\n2,"b\n3,c\n', ("broken CSV", 3, 12), "a"),
        (b'id,text\n1,a\n2,"b\n' + b"3,c\n" * 50, ("giant", 3, 12), "a"),
        (b"id,text\n1,a\n2,b\xff\n3,c\n", ("not UTF-8", 3, 15), "ac"),
        (b"id,text\n1,a\n2,b\0\n3,c\n", ("NUL", 3, 15), "ac"),
        (b"id,text,text\n1,a,b\n", ("key twice", 1, 0), ""),
        (b"id,body\n1,a\n", ("missing field", 1, 0), ""),
        (b"id,text\n1,a\n2,\n", ("empty record", 3, 12), "a"),
    ],
)
def test_broken_csv(tmp_path: Path, raw: bytes, expected: tuple[str, int, int], texts: str) -> None:
    documents, defects = read(tmp_path / "a.csv", raw, max_bytes=100)
    assert brief(defects) == [expected] and "".join(d.text for d in documents) == texts


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    table = pa.table(
        {
            "text": pa.array(["one", None, "three", " ", b"\xff\xfe".decode("latin-1")]),
            "n": pa.array([2**64 - 1, 2**63, 3, 4, 5], pa.uint64()),
            "day": [datetime.date(2020, 1, 1)] * 5,
            "s": [{"x": "007"}] * 5,
            "word": pa.array(["w"] * 5).dictionary_encode(),
        }
    )
    parquet.write_table(table, path)
    found: list[Defect] = []
    format = Format(id="n", meta=("day", "s.x", "word", "absent"), mode="skip")
    documents = list(open_documents(path, format, found.append))
    assert [(d.id, d.text) for d in documents] == [("18446744073709551615", "one"), ("3", "three"), ("5", "ÿþ")]
    assert documents[0].meta == {"day": "2020-01-01", "s.x": "007", "word": "w"}
    assert [(d.kind, d.row) for d in found] == [("missing field", 1), ("empty record", 3)]
    packed = tmp_path / "b.parquet.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [d.text for d in open_documents(packed, format)] == ["one", "three", "ÿþ"]
    for text, kind in (("n", "wrong type"), ("absent", "missing field")):
        found.clear()
        assert not list(open_documents(packed, Format(text=text, mode="skip"), found.append))
        assert {d.kind for d in found} == {kind}
    for keep in (0, 3, path.stat().st_size // 2, path.stat().st_size - 1):
        documents, found = read(tmp_path / "c.parquet", path.read_bytes()[:keep])
        assert not documents and [d.kind for d in found] == ["damaged" if keep else "empty file"]


def test_parquet_with_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    data = pa.array([b"fine", b"caf\xe9", b"a\0b"], pa.binary())
    parquet.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 3, data.buffers())}), path)
    found: list[Defect] = []
    assert [d.text for d in open_documents(path, Format(mode="skip"), found.append)] == ["fine"]
    assert [(d.kind, d.row, d.line) for d in found] == [("not UTF-8", 1, None), ("NUL", 2, None)]
    texts = [d.text for d in open_documents(path, Format(mode="replace"))]
    assert texts == ["fine", "caf\ufffd", "a\ufffdb"]


def test_html_keeps_code(tmp_path: Path) -> None:
    pytest.importorskip("trafilatura")
    (document,), defects = read(tmp_path / "a.html", PAGE.encode())
    assert CODE in document.text and "one\n  two\n\nthree" in document.text
    assert "\n\n- first item\n- second item\n\nThe end & more." in document.text
    assert "menu" not in document.text and document.meta == {"title": "Sorting lists"} and not defects
    latin = '<meta charset="iso-8859-1"><p>é'.encode("latin-1")
    assert [d.text for d in read(tmp_path / "b.html", latin)[0]] == ["é"]
    assert brief(read(tmp_path / "b.html", latin[27:])[1]) == [("not UTF-8", 1, 3)]


@pytest.mark.parametrize("packed", [False, True])
def test_warc(tmp_path: Path, packed: bool) -> None:
    pytest.importorskip("trafilatura")
    url = "WARC-Target-URI: http://x.org/\r\n"
    chunked = b"12;x=y\r\n<p>chunked page</p\r\n1\r\n>\r\n0\r\n\r\n"
    records = [
        warc("warcinfo", b"software: x", 0),
        warc("conversion", "extracted ä\n".encode(), 1, extra=url),
        warc("response", http(PAGE.encode()), 2),
        warc("response", http(chunked, "Transfer-Encoding: chunked\r\nContent-Type: text/html"), 3),
        warc("response", http(gzip.compress(b"<p>zip</p>"), "Content-Encoding: gzip\r\nContent-Type: text/html"), 4),
        warc("response", http(b"\x89PNG", "Content-Type: image/png"), 5),
        warc("response", b"HTTP/1.1 404 Not Found\r\nContent-Type: text/html\r\n\r\nno", 6),
        warc("response", http("<p>é</p>".encode("latin-1"), "Content-Type: text/html; charset=latin-1"), 7),
    ]
    raw = b"".join(map(gzip.compress, records)) if packed else b"".join(records)
    documents, defects = read(tmp_path / ("a.warc.gz" if packed else "a.warc"), raw)
    assert [d.id for d in documents] == [f"urn:uuid:{i}" for i in (1, 2, 3, 4, 7)] and not defects
    assert [d.text for d in documents if d.id[-1] in "1347"] == ["extracted ä\n", "chunked page", "zip", "é"]
    assert documents[0].meta == {"url": "http://x.org/"} and CODE in documents[1].text


def test_broken_warc(tmp_path: Path) -> None:
    good, last = warc("conversion", b"good", 1), warc("conversion", b"last", 9)
    path = tmp_path / "a.wet"
    at = len(good)
    for raw, kind, byte, message in (
        (warc("conversion", b"short", 2, 500), "short record", at, "has 5 bytes, shorter than its Content-Length"),
        (warc("conversion", b"longer than said", 2, 5), "short record", at, "is longer than its Content-Length of 5"),
        (b"WARC/1.0\r\nWARC-Type: conversion\r\n\r\nx\r\n\r\n", "broken WARC", at, "no valid Content-Length"),
        (b"rubbish\r\n\r\n", "broken WARC", at, "no WARC record"),
        (warc("conversion", b"x" * 2000, 2), "giant", at, "larger than 1,000 bytes"),
        (warc("conversion", b"caf\xe9", 2), "not UTF-8", at + 87, "0xe9"),
    ):
        documents, defects = read(path, good + raw + last, max_bytes=1000)
        assert [d.text for d in documents] == ["good", "last"]
        assert [(d.kind, d.byte) for d in defects] == [(kind, byte)] and message in str(defects[0])
    documents, defects = read(path, good + last[:-6])
    assert [d.text for d in documents] == ["good"] and brief(defects) == [("short record", 8, at)]
    packed = gzip.compress(good) + gzip.compress(last)
    documents, defects = read(tmp_path / "a.wet.gz", packed[:-12])
    assert [d.text for d in documents] == ["good"] and [d.kind for d in defects] == ["damaged"]
    assert brief(read(path, b"")[1]) == [("empty file", None, None)]
    assert "does not begin with WARC" in read(path, b"<html>")[1][0].problem


def test_mediawiki(tmp_path: Path) -> None:
    path = tmp_path / "wiki.xml"
    documents, defects = read(path, WIKI.encode(), name="mediawiki")
    assert [(d.id, d.meta["title"]) for d in documents] == [("12", "Anarchism & co"), ("15", "Last")] and not defects
    assert documents[0].text == "Bold is\na word.\n\nHead\n\n- item site\n\nif (a[[0]])\n\n    b();"
    bad = WIKI.encode().replace(b"Bold", b"B\xffld")
    documents, defects = read(path, bad, name="mediawiki")
    assert [d.id for d in documents] == ["15"] and brief(defects) == [("not UTF-8", 3, bad.index(b"\xff"))]
    documents, _ = read(path, bad, name="mediawiki", mode="replace")
    assert documents[0].text.startswith("B\ufffdld") and len(documents) == 2
    documents, defects = read(path, WIKI.encode()[:-100], name="mediawiki")
    assert [d.id for d in documents] == ["12"] and [d.kind for d in defects] == ["broken XML"]
    assert defects[0].byte == WIKI.rindex("<", 0, -100) and "the rest of the file is not read" in defects[0].problem
    documents, defects = read(path, WIKI.encode(), name="mediawiki", max_bytes=100)
    assert [d.id for d in documents] == ["15"] and [d.kind for d in defects] == ["giant"]
    assert [d.kind for d in read(path, b"<html></html>", name="mediawiki")[1]] == ["empty file"]
    bomb = b'<!DOCTYPE x [<!ENTITY a "aaaa">]><mediawiki>&a;</mediawiki>'
    assert "declares entities" in read(path, bomb, name="mediawiki")[1][0].problem


def test_stackexchange(tmp_path: Path) -> None:
    pytest.importorskip("lxml")
    path = tmp_path / "Posts.xml"
    documents, defects = read(path, POSTS.encode(), name="stackexchange")
    assert [d.id for d in documents] == ["4", "7"]
    assert documents[0].text == "How?\n\nWhy & how?\n\na\n\n    b\n\naccepted\n\nbest"
    assert documents[0].meta == {"title": "How?", "tags": "c io", "score": "3", "license": "CC BY-SA 4.0"}
    assert brief(defects) == [("wrong type", 9, POSTS.index('<row Id="x"'))]


def test_pile_and_reddit(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    pile = zstandard.compress(b'{"text": "t", "meta": {"pile_set_name": "ArXiv"}}\n')
    (document,), _ = read(tmp_path / "00.jsonl.zst", pile, name="pile")
    assert (document.text, document.meta) == ("t", {"meta.pile_set_name": "ArXiv"})
    reddit = b'{"body": "b", "id": "c1", "subreddit": "s", "n": 1}\n{"body": "[deleted]", "id": "c2"}\n'
    compressor = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    ).compressobj()  # as `zstd --long=31` does it, with no size in the frame
    packed = compressor.compress(reddit) + compressor.flush()
    (document,), defects = read(tmp_path / "RC_2015-01.zst", packed, name="reddit")
    assert (document.text, document.id, document.meta) == ("b", "c1", {"subreddit": "s"})
    assert not defects
    with pytest.raises(UserError, match="name a format"):
        read(tmp_path / "RC_2015-01.zst", packed)


@pytest.mark.parametrize(
    "source, expected",
    [
        ("== A ==\n=== B ===\ntext", "A\n\nB\n\ntext"),  # headings on the first line and on following ones
        ("* a\n*: b\n; c\n## d", "- a\nb\nc\n- d"),
        ("{|\n| x\n|}\n{|\n| y\n|} after", "after"),
        ("{|\n| x\n:{| \n| y\n|}\n|}z", "z"),  # one table in another
        ("{|\n|}{|\n|}", ""),
        ("a {| b\n|}", "a {| b\n|}"),  # begins within a line
        ("{|\n| never ends\n\ntext", "{|\n| never ends\n\ntext"),
        ("''a'' '''b''' '''''c''''' ''''''d 'e'", "a b c 'd 'e'"),
    ],
)
def test_lines_of_wikitext(source: str, expected: str) -> None:
    assert plain_text(source) == expected
