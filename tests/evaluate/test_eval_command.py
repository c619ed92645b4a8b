"""`fastgpt eval` from the command line: files that it writes, checkpoints, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from benchmark_files import write_all
from small_target import small_target

from fastgpt import cli
from fastgpt.evaluate.command import SUBCOMMANDS
from fastgpt.evaluate.results import load_results
from fastgpt.training import checkpoint

pytest.importorskip("lm_eval")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run with two checkpoints, and data beside it, in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_all(tmp_path / "data", n=3)
    small = small_target(tmp_path)
    for step in (2, 10):
        state = {"progress": {"tokens": step * 64}, "model": dataclasses.asdict(small.model.config), "config": {}}
        state |= {"tokenizer": small.tokenizer.fingerprint, "loader": {}}
        checkpoint.save(tmp_path / "run", step, small.model.state_dict(), {}, state, keep=0)
    small.tokenizer.save(tmp_path / "run" / "tokenizer.json")
    (tmp_path / "tasks.yaml").write_text("[piqa, blimp]")
    (tmp_path / "a.txt").write_text("the cat runs")
    return tmp_path / "run"


def command(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr("sys.argv", ["fastgpt", "eval", *argv, *(["--device", "cpu"] if argv[0] == "run" else [])])
    return cli.main()


def test_it_prints_a_table_and_writes_json(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        command(monkeypatch, "run", "--data", "data", "--preset", "tasks.yaml", "--texts", "a.txt", "--limit", "2") == 0
    )
    said = capsys.readouterr()
    assert not said.err  # the harness is quiet
    lines = said.out.splitlines()
    assert lines[1].split()[:4] == ["task", "metric", "value", "±"] and lines[2].split()[:2] == ["piqa", "acc"]
    assert "note: the first 2 items of each task only (--limit 2)" in lines and "0.5000" in said.out
    results = load_results(run / "eval" / "step-10-tasks.json")
    assert results.model["step"] == 10 and results.model["tokens"] == 640 and results.preset == "tasks.yaml"
    assert results.versions["lm_eval"] and {f.task for f in results.figures} >= {"piqa", "blimp", "a.txt"}
    assert set(results.seconds) >= {"piqa", "blimp", "a.txt"} and results.truncated["piqa"] == 0


def test_checkpoints_become_a_page_with_plots(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    options = ["--data", "data", "--preset", "tasks.yaml", "--limit", "2", "--page", "p.html"]
    assert command(monkeypatch, "run", *options, "--all-checkpoints") == 0
    assert {p.name for p in (run / "eval").iterdir()} == {"step-2-tasks.json", "step-10-tasks.json"}
    page = Path("p.html").read_text(encoding="utf-8")
    assert 'alt="accuracy of piqa over the checkpoints"' in page and "at step 10" in page
    assert page.count("data:image/png;base64") == 2 and "blimp/adjunct_island" in page and "<details>" in page
    assert "http" not in page  # it loads nothing else
    capsys.readouterr()
    assert command(monkeypatch, "compare", "run/step_00000002", "run") == 0
    said = capsys.readouterr().out
    assert "A is run/step_00000002 at step 2, B is run/step_00000010 at step 10" in said
    assert "Not compared" not in said  # the paradigms of BLiMP are compared with it
    single = ["--out", "alone.json", "--page", "alone.html"]
    assert command(monkeypatch, "run", *options[:-2], *single) == 0
    assert "data:image" not in Path("alone.html").read_text(encoding="utf-8")
    assert json.loads(Path("alone.json").read_text())["version"] == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "nowhere is not a folder, expected a run"),
        (["run", "--preset", "bas"], "preset is 'bas', expected base, full, safety or a file"),
        (["run", "--preset", "base"], "preset base found nothing to evaluate: the validation data is not scored"),
        (["run", "--data", "data/piqa/valid.jsonl"], "is not a folder, expected one with the files of the benchmarks"),
        (["run", "--out", "data"], "data is a folder, expected the name of a file"),
        (["run", "--all-checkpoints", "--out", "x.json"], "expected no --out"),
        (["data", "--all-checkpoints"], "data has no checkpoints, expected the folder of a run"),
        (["run", "--limit", "0"], "--limit is '0', expected a whole number, 1 or more"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    argv: list[str], message: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *argv) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (run / "eval").exists()


def test_help_names_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command(monkeypatch, "--help")
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in SUBCOMMANDS)
