"""The range test of the learning rate: its curve, its suggestions, and that it leaves no run behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fastgpt import cli, train
from fastgpt.core.backend import use
from fastgpt.core.errors import UserError
from fastgpt.sweep.find_lr import BETA, Curve, averages, diverged, main

SMALL = (
    "--data my.txt --model.n-layers 1 --model.n-heads 2 --model.width 32 --block-size 32 --micro-batch 4 "
    "--batch-tokens 256 --vocab-size 300 --device cpu --lr 3e-3 --max-steps 4 --warmup-steps 2 --eval-batches 1 "
    "--sample-tokens 4 --out run"
).split()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    shutil.copy(Path(train.__file__), "my.txt")
    with use():
        yield tmp_path


def test_suggestions_of_a_known_curve() -> None:
    """The loss falls as a logistic curve whose steepest point is 1e-3, and rises from 1e-1 on."""
    rates = np.geomspace(1e-6, 1, 601)
    x = np.log10(rates)
    smoothed = 8 - 3 / (1 + np.exp(-6 * (x + 3))) + 40 * np.maximum(0, x + 1) ** 2
    curve = Curve(rates, smoothed, smoothed, True)
    assert curve.steepest() == pytest.approx(1e-3, rel=0.03)
    assert rates[curve.lowest()] == pytest.approx(0.1, rel=0.05)


def test_smoothing_does_not_shift_a_fall() -> None:
    losses = [8.0] * 50 + [4.0] * 50
    smoothed = (np.array(averages(losses)) + np.array(averages(losses[::-1])[::-1])) / 2
    assert smoothed[49] + smoothed[50] == pytest.approx(12.0, abs=0.1) and averages(losses)[50] > 7
    assert averages([3.0] * 5) == pytest.approx([3.0] * 5)


def test_divergence_is_a_rise_of_half_of_the_fall() -> None:
    assert not diverged([8.0, 6.0, 6.9]) and diverged([8.0, 6.0, 7.1])
    assert not diverged([8.0, 8.3]) and diverged([8.0, 8.5]), "noise at the start is no divergence"
    assert diverged([])


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_it_suggests_rates_and_leaves_no_run(optimizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--find-lr", "--find-lr-steps", "60", *SMALL, "--optimizer", optimizer]) == 0
    said, found = capsys.readouterr().out, json.loads(Path("run-find-lr/find_lr.json").read_text())
    rates, losses, smoothed = (np.array(found[name]) for name in ("rates", "losses", "smoothed"))
    assert rates[0] == pytest.approx(3e-7) and np.allclose(rates[1:] / rates[:-1], 1e7 ** (1 / 59))
    assert found["diverged"] and len(rates) < 60
    weights = BETA ** np.arange(len(losses))[::-1]
    assert smoothed[-1] == pytest.approx(((weights * losses).sum() / weights.sum() + losses[-1]) / 2)
    steepest, tenth = found["steepest_descent"], found["tenth_of_minimum"]
    lowest = rates[np.argmin(smoothed)]
    assert 1e-5 < steepest < lowest < 10 and tenth == pytest.approx(lowest / 10)
    assert f"--lr {steepest:.2e}" in said and f"--lr {tenth:.2e}" in said
    assert Path("run-find-lr/find_lr.png").read_bytes()[:4] == b"\x89PNG"
    assert {p.name for p in Path().iterdir()} <= {"my.txt", "run-find-lr", "data"}


def test_the_loss_of_a_rate_is_that_of_a_run() -> None:
    """Two runs of one step and the test's first steps begin with the same weights and batches."""
    main(["--find-lr", "--find-lr-steps", "40", "--lr-last", "1", *SMALL])
    tested = json.loads(Path("run-find-lr/find_lr.json").read_text())["losses"]
    first = "--lr 3e-7 --warmup-steps 0 --schedule constant --max-steps 1".split()
    train.main([*SMALL, *first])
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert tested[0] == rows[0]["loss"]


def test_an_existing_run_is_left_as_it_is() -> None:
    train.main(SMALL)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in Path("run").rglob("*")}
    main(["--find-lr", "--find-lr-steps", "30", "--lr-first", "1e-3", "--lr-last", "1", *SMALL, "--model.width", "16"])
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in Path("run").rglob("*")} == before


def test_mistakes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="the loss did not fall in 20 steps up to 1.00e-09"):
        main(["--find-lr", "--find-lr-steps", "20", "--lr-last", "1e-9", "--lr-first", "1e-10", *SMALL])
    with pytest.raises(UserError, match="--lr-first is 1, expected less than --lr-last 0.1"):
        main(["--find-lr", "--lr-first", "1", "--lr-last", "0.1", *SMALL])
    with pytest.raises(UserError, match="lrs is not a setting"):
        main(["--find-lr", "--lrs", "1", *SMALL])
    assert not Path("run-find-lr").exists()
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--find-lr works in one process"):
        main(["--find-lr", *SMALL])


def test_the_option_reaches_the_test_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.train(["--find-lr", "--help"])
    assert "--find-lr-steps" in capsys.readouterr().out
