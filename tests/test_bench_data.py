"""The benchmark of data sets, on a corpus of some kilobytes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fastgpt.bench import data
from fastgpt.bench._corpus import documents, write_corpus
from fastgpt.bench.data import main, tree_mb


def test_corpus_is_the_same_twice_and_grows(tmp_path: Path) -> None:
    sizes = [write_corpus(tmp_path / name, megabytes) for name, megabytes in (("a", 0.1), ("b", 0.1), ("c", 0.2))]
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b and c.startswith(a) and sizes[0] == sizes[1] >= 100_000 and sizes[2] >= 200_000
    texts = [text for text, _ in zip(documents(), range(400))]
    assert 4 <= 400 - len(set(texts)) <= 60, "some documents are copies"
    assert len({t[:200] for t in texts}) > 250
    lines = [json.loads(line) for line in a.decode().splitlines()]
    assert [r["text"] for r in lines] == texts[: len(lines)] and len({r["id"] for r in lines}) == len(lines)


def test_encode_and_dedup_against_their_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datasketch")
    out = tmp_path / "rows.jsonl"
    assert main(["encode", "dedup", "--megabytes", "0.1", "--rounds", "1", "--json", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["figure"], r["provider"]) for r in rows] == [
        ("encode", "fastgpt"),
        ("encode", "tiktoken"),
        ("encode", "tokenizers"),
        ("dedup", "fastgpt"),
        ("dedup", "datasketch"),
    ]
    assert all(r["mb_s"] > 0 and r["speed"] > 0 for r in rows) and len({r["tokens"] for r in rows[:3]}) == 1
    assert all(r["recall"] > 0.8 for r in rows[3:])
    said = capsys.readouterr().out
    assert "MB/s of one core" in said and "times as fast" in said


def test_other_ids_give_no_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def apart(figure: str, name: str, folder: Path) -> dict[str, Any]:
        return {"seconds": 1.0, "digest": name}

    monkeypatch.setattr(data, "apart", apart)
    (row,) = data.compare("encode", tmp_path, 1000, 1, "")
    assert row["red"] == "the contestants return different ids" and "mb_s" not in row


def test_build_and_memory(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    few = ["--megabytes", "0.1", "--rounds", "1", "--memory-megabytes", "0.1", "--workers", "1", "--json", str(out)]
    assert main(["build", "memory", *few]) == 0
    build, memory = (json.loads(line) for line in out.read_text().splitlines())
    assert build["figure"] == "build" and 50 < build["peak_mb"] < 1000 and build["mb_s"] > 0
    assert memory["shape"] == "0.1MB" and 50 < memory["peak_mb"] < 1000
    assert tree_mb(os.getpid()) > 20 and tree_mb(2**22 + 1) == 0
