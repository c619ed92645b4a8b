"""Properties of the readers: any text comes back; any damage to a file gives documents or a defect."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from data_samples import PAGE, POSTS, WIKI, http, warc

from fastgpt.data.document import Document
from fastgpt.data.read import Defect, Format, open_documents, parts_of, reading, streams

pytest.importorskip("orjson")
pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

fast = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
texts = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), max_size=6)


def read(path: Path, raw: bytes, **options: object) -> tuple[list[Document], list[Defect]]:
    path.write_bytes(raw)
    found: list[Defect] = []
    return list(open_documents(path, Format(**{"mode": "skip", **options}), found.append)), found  # type: ignore


def visible(values: list[str]) -> list[str]:
    return [v for v in values if v and not v.isspace()]


def as_jsonl(values: list[str], ascii: bool) -> bytes:
    return "".join(json.dumps({"text": v}, ensure_ascii=ascii) + "\n" for v in values).encode()


def as_csv(values: list[str]) -> bytes:
    out = io.StringIO()
    csv.writer(out).writerows([["text", "n"], *([v, "1"] for v in values)])
    return out.getvalue().encode()


@fast
@given(texts, st.booleans(), st.integers(1, 100))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, values: list[str], ascii: bool, n: int) -> None:
    folder = tmp_path_factory.mktemp("texts")
    raw = as_jsonl(values, ascii)
    packs: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
    for suffix, pack in packs.items():
        documents, defects = read(folder / f"a.jsonl{suffix}", pack(raw[:n]) + pack(raw[n:]))
        assert [d.text for d in documents] == visible(values)
        assert {d.kind for d in defects} <= {"empty record", "empty file"}
    if raw:
        found = [
            d.text
            for part in parts_of(folder / "a.jsonl", size=n)
            for d in open_documents(part, Format(mode="skip"), lambda d: None)
        ]
        assert found == visible(values)
    whole = f"[{','.join(json.dumps({'text': v}, ensure_ascii=ascii) for v in values)}]".encode()
    assert [d.text for d in read(folder / "a.json", whole)[0]] == visible(values)
    clean = ["".join(c for c in v if c >= " " or c in "\n\t") for v in values]  # many control characters: a binary file
    assert [d.text for d in read(folder / "a.csv", as_csv(clean))[0]] == visible(clean)


@fast
@given(texts)
def test_any_text_comes_back_from_parquet(tmp_path_factory: pytest.TempPathFactory, values: list[str]) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path_factory.mktemp("texts") / "a.parquet"
    parquet.write_table(pa.table({"text": pa.array(values, pa.large_string())}), path, row_group_size=2)
    documents = list(open_documents(path, Format(mode="skip"), lambda d: None))
    assert [d.text for d in documents] == visible(values)


VALID = {
    "a.jsonl": b'{"text": "one \\u00e4", "id": 1}\n{"text": "two", "id": 2.5}\n{"text": "three", "m": {"x": [1]}}\n',
    "a.json": b'[{"text": "one"}, {"text": "two", "x": [{}]}]',
    "a.csv": b'text,id\n"one\ntwo",7\nthree,"8"\n',
    "a.txt": "one\n\n<|endoftext|>zwei ä\n".encode(),
    "a.html": PAGE.encode(),
    "wiki.xml": WIKI.encode(),
    "Posts.xml": POSTS.encode(),
    "a.warc": warc("conversion", b"one", 1) + warc("response", http(b"<p>two</p>"), 2) + warc("conversion", b"x", 3),
    "a.jsonl.gz": gzip.compress(b'{"text": "one"}\n') + gzip.compress(b'{"text": "two"}\n'),
    "a.txt.bz2": bz2.compress(b"one two"),
    "a.txt.xz": lzma.compress(b"one two"),
}
RAW = streams._raw
NAMES = {"wiki.xml": "mediawiki", "Posts.xml": "stackexchange"}


@pytest.mark.parametrize("name", [*VALID, "p.txt", "l.txt", "s.txt"])
def test_chunks_do_not_matter(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trafilatura")
    options: dict[str, object] = {"name": NAMES.get(name, "auto"), "piece_bytes": 9}
    options["split"] = {"p.txt": "paragraph", "l.txt": "line", "s.txt": "piece"}.get(name, "document")
    raw = VALID.get(name, b"\xef\xbb\xbf\n\none\r\n \r\n\n\ntwo\n\xc3\xa4\n" + b"\n" * 700 + b"three\n\xff\n\n\0four")
    inner = [raw.replace(b"two", b"t\xff"), raw.replace(b"one", b"o\0")]
    for damage in (raw, raw[:-1], *(inner if name in NAMES or name.count(".") == 1 else [])):
        with monkeypatch.context() as m:
            whole = read(tmp_path / name, damage, **options)
            m.setattr(reading, "SNIFF", 4)
            for size in (1, 2, 7, 50):
                m.setattr(streams, "CHUNK", size)
                m.setattr(streams, "_raw", lambda *args, size=size, of=RAW: of(*args[:4], size))
                assert read(tmp_path / name, damage, **options) == whole, (size, damage)


@st.composite
def damaged(draw: st.DrawFn, raw: bytes) -> bytes:
    """Draw a copy of some bytes with a few of them changed, removed or inserted."""
    data = bytearray(raw)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["cut", "remove", "insert", "change"]))
        if kind == "cut":
            del data[at:]
        elif kind == "remove":
            del data[at : at + draw(st.integers(1, 20))]
        elif kind == "insert":
            data[at:at] = draw(
                st.sampled_from([b"\0", b"\xff", b'"', b"\n", b"{", b"<", b"\\ud800", b"&#1;", b"[" * 99])
            )
        else:
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
    return bytes(data)


@pytest.mark.parametrize("name", VALID)
def test_any_damage_gives_documents_or_defects(name: str, tmp_path: Path) -> None:
    pytest.importorskip("trafilatura")

    @fast
    @given(damaged(VALID[name]), st.sampled_from(["skip", "replace"]))
    def check(raw: bytes, mode: str) -> None:
        documents, defects = read(tmp_path / name, raw, name=NAMES.get(name, "auto"), mode=mode, id=None)
        for document in documents:
            assert "\0" not in document.text and document.text.strip()
            document.text.encode()
            document.id.encode()
            for value in document.meta.values():
                value.encode()
        for defect in defects:
            assert defect.byte is None or 0 <= defect.byte <= max(len(raw), 1000)
            assert "\n" not in str(defect).strip()
            str(defect).encode()
        first, again = read(tmp_path / name, raw, name=NAMES.get(name, "auto"), mode=mode, id=None)
        assert (first, again) == (documents, defects)

    check()
