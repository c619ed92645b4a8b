"""The command `fastgpt data dedup`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastgpt.core.command import run_command
from fastgpt.data.command import main

WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"


def dedup(*options: str | Path) -> int:
    return run_command(lambda: main(["dedup", *map(str, options)]))


def lines(*texts: str) -> str:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))


@pytest.mark.parametrize("part", [1 << 26, 1])
def test_dedup(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    monkeypatch.setattr("fastgpt.data.dedup.command.PART", part)
    a, b, out, test = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "out.jsonl", "test.txt"))
    a.write_text("\n" + lines("Alpha beta.", "", WORDS))
    b.write_text(lines("alpha BETA", "Alpha beta.", "other", f"So {WORDS.upper()} again, more words").rstrip("\n"))
    test.write_text(WORDS)
    assert dedup(a, b, "--out", out, "--against", test) == 0
    assert out.read_text() == lines("Alpha beta.") + json.dumps({"id": 2, "text": "other"}) + "\n"
    shown = capsys.readouterr().out
    assert shown.startswith("2 of 7 documents stay: dropped 1 equal, 1 similar, 1 empty\n")
    assert f"  {b} duplicates {a}: 1 equal, 1 similar\n  2 dropped because of {test}\n" in shown
    assert dedup(b, "--out", b, "--exact") == 0
    assert len(b.read_text().splitlines()) == 4 and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("line", ["{", "[]", '{"text": 1}', '{"other": "x"}'])
def test_a_bad_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    (tmp_path / "a.jsonl").write_text(f"{lines('x')}{line}\n")
    assert dedup(tmp_path / "a.jsonl", "--out", tmp_path / "out") == 2
    assert "a.jsonl:2: expected a JSON object with text in the field 'text'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
