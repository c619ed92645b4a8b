"""tests/versions.py: a pair's packages, and its row in the table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import versions

JUNIT = '<testsuites><testsuite errors="1" failures="2" skipped="3" tests="16" time="1.5"/></testsuites>'


@pytest.mark.parametrize("pair", versions.PAIRS)
def test_a_pair_names_each_package_once(pair: str) -> None:
    """The pair's pins replace those of the pinned pair; the rest is the same."""
    names = {
        p: re.findall(r"^([\w.-]+)(?:\[\w+\])?==\S+ *(.*)$", versions.requirements(p), re.MULTILINE)
        for p in (pair, "pinned")
    }
    assert len(set(names[pair])) == len(names[pair]) and set(names[pair]) == set(names["pinned"])
    assert ("torch==2.13.0" in versions.requirements(pair).splitlines()) == (pair == "pinned")


def test_a_row_replaces_the_pairs_and_keeps_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "junit.xml").write_text(JUNIT)
    monkeypatch.setattr(versions.subprocess, "run", lambda *_, **__: type("Done", (), {"stdout": "abc"}))
    line = versions.row("oldest", Path("python"), tmp_path, 61.6)
    assert line.split(" | ", 2)[1:] == ["abc", "oldest | abc | 10 | 3 | 3 | 62 |"]
    empty = "# Versions\n\n| date | commit | pair |\n| --- | --- | --- |\n\nafter | that\n"
    text = versions.with_row(versions.with_row(empty, "newest", "| 1 | b | newest |"), "oldest", "| 1 | a | oldest |")
    text = versions.with_row(text, "newest", "| 2 | c | newest |")
    assert text == empty.replace("--- |\n\n", "--- |\n| 1 | a | oldest |\n| 2 | c | newest |\n\n")
    assert versions.with_row(versions.TABLE.read_text(), "pinned", line).count("\n") >= 20
