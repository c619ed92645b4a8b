"""The commands `fastgpt data clean` and `fastgpt data classifier`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastgpt.core.command import run_command
from fastgpt.data.command import main


def run(*argv: str) -> int:
    """Return the exit code of `fastgpt data`."""
    return run_command(lambda: main(list(argv)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("Write to me@there.org.\n")
    (tmp_path / "b.txt").write_text("SECRET SHOUT\n")
    return tmp_path


def test_dry_run_prints_counts_and_ids_but_no_texts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("clean", "--dry-run", "--preset", "docs", "--set", "spam=true", str(folder)) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith("1 of 2 documents stay")
    assert [line.split() for line in out.splitlines() if "spam" in line] == [["spam_capitals", "1", "50.0%", "b.txt#0"]]
    assert "SECRET" not in out and "there" not in out
    assert sorted(p.name for p in folder.iterdir()) == ["a.txt", "b.txt"]
    assert run("clean", "--dry-run", "--preset", "none", "--set", "spam=true", "--show", "1", str(folder)) == 0
    assert 'spam_capitals: b.txt#0\n"SECRET SHOUT\\n"' in capsys.readouterr().out


def test_out_holds_the_cleaned_documents(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out.jsonl"
    assert (
        run("clean", "--preset", "docs", "--set", "spam=true", "--json", "--out", str(out), str(folder / "*.txt")) == 0
    )
    (record,) = map(json.loads, out.read_text().splitlines())
    assert (record["text"], record["id"]) == ("Write to <EMAIL>.", "a.txt#0")
    assert json.loads(capsys.readouterr().out)["dropped"] == {"spam_capitals": 1}
    assert sorted(p.name for p in folder.iterdir()) == ["a.txt", "b.txt", "out.jsonl"]


WRONG = [
    ([], "clean: expected either --out FILE or --dry-run"),
    (["--dry-run", "--out", "x"], "clean: expected either --out FILE or --dry-run"),
    (["--dry-run", "--set", "spam"], "clean: --set 'spam', expected RULE=VALUE or RULE.KEY=VALUE"),
    (["--dry-run", "--set", "spam.=1"], "clean: --set 'spam.=1', expected RULE=VALUE"),
    (["--dry-run", "--set", "spam=[1"], "clean: --set 'spam=[1', expected RULE=VALUE"),
    (["--dry-run", "--set", "spam.min_link=1"], "the nearest known one is 'min_links'"),
    (["--out", "/none/x.jsonl"], "clean: cannot write /none/x.jsonl: No such file or directory"),
]


@pytest.mark.parametrize("options, message", WRONG)
def test_wrong_options(folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("clean", str(folder), *options) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.count("\n") == 0


def test_a_failed_run_leaves_no_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "c.txt").write_bytes(b"\xff\xfe\xfd")
    assert run("clean", "--preset", "docs", "--out", str(folder / "out.jsonl"), str(folder)) == 2
    assert "c.txt" in capsys.readouterr().err
    assert sorted(p.name for p in folder.iterdir()) == ["a.txt", "b.txt", "c.txt"]


def test_classifier_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, word in (("good", "fine"), ("bad", "poor")):
        lines = [json.dumps({"text": f"{word} text number {i}"}) for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    paths = [str(tmp_path / name) for name in ("good.jsonl", "bad.jsonl", "q.npz")]
    assert run("classifier", "train", "--bits", "10", *paths) == 0
    expected = f"accuracy 1.0000, AUC 1.0000 on 4 good and 4 bad samples held out; wrote {paths[2]}\n"
    assert capsys.readouterr().out == expected
    option = ["--set", f"classifier.path={paths[2]}"]
    assert run("clean", "--dry-run", "--preset", "none", *option, *paths[:2]) == 0
    assert capsys.readouterr().out.startswith("20 of 40 documents stay")
