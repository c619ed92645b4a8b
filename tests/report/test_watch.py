"""`fastgpt watch`: what it shows, when it ends, and that it follows a run that grows, resumes or dies."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from run_folders import STEP, write_run

from fastgpt.core.errors import UserError
from fastgpt.report import run as run_module
from fastgpt.report import watch
from fastgpt.report.run import RunFiles
from fastgpt.report.text_plot import plot
from fastgpt.report.words import duration
from fastgpt.training.config import TrainConfig
from fastgpt.training.runlog import Log


def set_progress(folder: Path, **values: object) -> None:
    path = folder / "progress.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def append(folder: Path, step: int, loss: float) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**STEP, "step": step, "loss": loss, "seconds": step * step / 2}) + "\n")


def test_once_prints_the_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", ended=False)
    set_progress(tmp_path / "run", last_step=30)
    assert watch.main([str(tmp_path / "run"), "--once"]) == 0
    out = capsys.readouterr().out
    assert "step 20/30 | loss 2.0500 | val_loss 2.0500 | 2,000 tok/s | 2 min left" in out, "10.5 s a step, ten to go"
    assert "best val_loss 2.0500 at step 20" in out and "step_00000020" in out.replace("\n  ", "")
    assert "warning: 1 of 20 steps were skipped, the last at step 3" in out
    assert "ended" not in out and all(len(line) <= 80 for line in out.splitlines()) and "\x1b" not in out
    assert 15 < len(out.splitlines()) <= 24


def test_a_silent_run_and_a_slow_one_are_warned_of(tmp_path: Path) -> None:
    write_run(tmp_path, steps=20, ended=False)
    run = RunFiles.open(tmp_path)
    run.refresh()
    changed = run.tail.path.stat().st_mtime
    assert not any("no new row" in text for text in watch.warnings(run, changed + 100)), "steps take 10 s"
    assert "no new row for 10 min" in list(watch.warnings(run, changed + 600))
    for step in range(21, 700):
        run.metrics.add({**STEP, "step": step, "tokens_per_second": 2000.0 if step < 500 else 500.0})
    assert any("the last 100 steps ran at " in text for text in watch.warnings(run, changed))


def follow(run: Path, monkeypatch: pytest.MonkeyPatch, events: list[Any]) -> int:
    """Return the exit code of `fastgpt watch`, in which each pause does the next of `events`."""
    waiting = iter(events)
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: next(waiting)())
    code = watch.main([str(run)])
    assert next(waiting, None) is None, "it waits until the run ends"
    return code


def test_it_follows_a_run_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, ended=False)
    set_progress(tmp_path, last_step=22)

    def resume() -> None:
        rows = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "new").write_text("".join(rows[:9]))
        (tmp_path / "new").replace(tmp_path / "metrics.jsonl")

    def end() -> None:
        append(tmp_path, 22, 1.25)
        set_progress(tmp_path, ended=True)

    quiet = lambda: None  # noqa: E731
    assert follow(tmp_path, monkeypatch, [quiet, lambda: append(tmp_path, 21, 1.5), resume, end]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("step ", "the run"))]
    first, grown, resumed, *last = shown
    assert first.startswith("step 20/22 | loss 2.0500") and grown.startswith("step 21/22 | loss 1.5000")
    assert resumed.startswith("step 9/22 | loss 2.1111"), "rows after the checkpoint are gone"
    assert last[-1] == "the run ended at step 22"


def test_ctrl_c_ends_it_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, ended=False)

    def interrupt() -> None:
        raise KeyboardInterrupt

    assert follow(tmp_path, monkeypatch, [interrupt]) == 0


def test_a_killed_run_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, ended=False)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    set_progress(tmp_path, process=child.pid, host=platform.node())
    run = RunFiles.open(tmp_path)
    run.refresh()
    assert not run.ended(), "its process lives"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert follow(tmp_path, monkeypatch, []) == 0
    assert "the process of the run is gone since step 20" in capsys.readouterr().out


def test_the_last_rows_of_a_killed_run_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, ended=False)
    set_progress(tmp_path, host=platform.node())
    killed: list[bool] = []

    def gone(progress: dict[str, Any]) -> bool:
        """Look a moment after the rows were read, and find that the run wrote one more and was killed."""
        if killed == [True]:
            append(tmp_path, 21, 1.5)
            killed.append(True)
        return bool(killed)

    monkeypatch.setattr(run_module, "_gone", gone)
    assert follow(tmp_path, monkeypatch, [lambda: killed.append(True)]) == 0
    assert "is gone since step 21" in capsys.readouterr().out


def test_it_waits_for_the_first_step_of_a_run_that_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, steps=0, ended=False)
    set_progress(tmp_path, last_step=None)
    with pytest.raises(UserError, match="has no row of a step"):
        watch.main([str(tmp_path), "--once"])

    def begin() -> None:
        append(tmp_path, 1, 5.0)

    assert follow(tmp_path, monkeypatch, [begin, lambda: set_progress(tmp_path, ended=True)]) == 0
    out = capsys.readouterr().out
    assert "waiting for the first step" in out and "step 1 | loss 5.0000" in out
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has no row of a step"):
        watch.main([str(tmp_path)])


def test_a_terminal_is_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal of 60 columns and 18 lines, each picture begins at its first line and fits."""
    write_run(tmp_path, ended=False)
    pictures: list[str] = []
    monkeypatch.setattr(watch.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(watch.shutil, "get_terminal_size", lambda *default: os.terminal_size((60, 18)))
    monkeypatch.setattr("builtins.print", lambda text, **options: pictures.append(text))
    assert (
        follow(tmp_path, monkeypatch, [lambda: append(tmp_path, 21, 1.5), lambda: set_progress(tmp_path, ended=True)])
        == 0
    )
    assert len(pictures) >= 3 and all(text.startswith(watch.CLEAR) for text in pictures)
    assert all(len(text.splitlines()) < 18 for text in pictures)
    assert all(len(line) <= 60 for text in pictures for line in text.removeprefix(watch.CLEAR).splitlines())


def test_the_plot_puts_points_where_they_belong() -> None:
    line = [(0.0, 0.0), (1.0, 1.0)]
    rows = [row.partition("|")[2] for row in plot(line, [(0.0, 1.0)], 18, 8, plain=True)]
    assert [row.find("*") for row in rows] == [7, 6, 5, 4, 3, 2, 1, 0] and rows[0][0] == "o"
    fine = [row.partition("│")[2] for row in plot(line, [], 18, 2)]  # 16 dots across, 8 down
    column = ("⠁⠂⠄⡀", "⠈⠐⠠⢀")  # the dots of a cell, from above
    dots = {
        (2 * x + side, 4 * y + down)
        for y, row in enumerate(fine)
        for x, cell in enumerate(row)
        for side in (0, 1)
        for down, one in enumerate(column[side])
        if cell != " " and (ord(cell) & ord(one)) - 0x2800
    }
    assert {x for x, _ in dots} == set(range(16)) and {(0, 7), (15, 0)} <= dots
    assert all(abs((15 - x) * 7 / 15 - y) <= 0.51 for x, y in dots)
    assert plot([], [], 18, 2) == [] and len(plot([(1.0, 2.0)], [], 18, 3)) == 3


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.0, "4 s"), (45, "45 s"), (720, "12 min"), (11100, "3 h 05 min"), (187200, "2 d 4 h"), (float("inf"), "-")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_log_says_how_long_its_run_is_and_when_it_ends(tmp_path: Path) -> None:
    cfg = TrainConfig(out=str(tmp_path), log_every=100)
    with closing(Log(tmp_path, cfg, 0, 5)) as log:
        log.sample(1, "early")
        log.step({**STEP, "step": 2}, 4)
        log.sample(2, "late \ud800")
        run = RunFiles.open(tmp_path)
        run.refresh()
        assert run.last_step == 4 and not run.ended(), "the length was set again"
    run.refresh()
    assert run.ended() == "the run ended at step 2" and [title for title, _ in run.samples()] == ["step 1", "step 2"]
    with closing(Log(tmp_path, cfg, 1, 5)):
        run.refresh()
        assert not run.ended() and [text for _, text in run.samples()] == ["early"], "what runs again is dropped"
