"""A sweep from its first run to its last: results, stops, failures and pruning, with a stand-in for the training."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastgpt.core.errors import UserError
from fastgpt.sweep import pool, search
from fastgpt.sweep.check import candidates
from fastgpt.sweep.command import locked, main
from fastgpt.sweep.spec import load
from fastgpt.training.config import load_config

OPTIONS = "options: {data: my.txt, vocab-size: 300, max-steps: 12, eval-every: 4, lr: 3e-3}\n"
GRID = f"config: tiny\n{OPTIONS}sampler: grid\nvariants: {{base: {{}}, low: {{lr: 3e-4}}}}\nseeds: [1, 2, 3]\n"
SEARCH = f"config: tiny\n{OPTIONS}".replace(", lr: 3e-3", "")
OUT = Path("runs/sweep")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in an empty folder with a text, and let the stand-in train."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pool, "CHILD", [sys.executable, "-S", str(Path(__file__).parents[1] / "stand_in_trainer.py")])
    monkeypatch.setattr(pool, "PERIOD", 0.01)
    Path("my.txt").write_text("def f(x):\n    return x + 1\n\n" * 400)
    yield tmp_path


def sweep(text: str, *more: str) -> int:
    Path("sweep.yaml").write_text(text)
    return main(["sweep.yaml", *more])


def results(out: Path = OUT) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def starts(out: Path = OUT) -> dict[str, int]:
    """Return how often each run was started."""
    return {str(p.parent.relative_to(out)): p.read_text().count("started") for p in out.rglob("starts.txt")}


def interrupted_after(runs: int, text: str) -> None:
    """Run a sweep and send it SIGTERM, as Ctrl-C does, while its run number `runs` trains."""

    def interrupt() -> None:
        while len(list(OUT.rglob("starts.txt"))) < runs:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert sweep(text) == 0
    thread.join()


def test_a_grid_compares_variants_with_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(GRID + "parallel: 2\n", "--markdown", "table.md") == 0
    said = capsys.readouterr().out
    assert "6 of 6: " in said and "base, seed 3: val_loss 0.2530 (6 s)" in said
    rows = results()
    assert [(row["name"], row["seed"]) for row in rows] == [(n, s) for n in ("base", "low") for s in (1, 2, 3)]
    assert [row["val_loss"] for row in rows[:3]] == pytest.approx([0.251, 0.252, 0.253])
    table = Path("table.md").read_text()
    assert "| variant | val_loss | difference from base | tokens/s | time | runs |" in table
    assert "| base | 0.2520 ± 0.0025 |  | 100.0 | 18 s | 3 of 3 |" in table
    assert "| low | 1.2520 ± 0.0025 | +1.0000 ± 0.0000 | 100.0 | 18 s | 3 of 3 |" in table
    assert "mean over 3 seeds, with 95 % interval (Student's t); differences are paired by seed" in table
    assert "a device, torch 2, commit abc." in table and "with 2 runs at a time" in table
    assert not list(OUT.rglob("step_*")), "checkpoints of finished runs are deleted"
    cfg = load_config(["--config", str(OUT / "best.yaml")])
    assert (cfg.lr, cfg.max_steps, cfg.max_minutes, cfg.model.width) == (3e-3, 12, None, 192)


def test_the_same_command_repeats_nothing_and_takes_what_is_new(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(GRID) == 0
    before = results()
    assert sweep(GRID) == 0 and results() == before and set(starts().values()) == {1}
    more = GRID.replace("[1, 2, 3]", "[1, 2, 3, 4]").replace("low:", "mid: {lr: 1e-3}, low:")
    assert sweep(more) == 0
    assert len(results()) == 12 and set(starts().values()) == {1}
    with pytest.raises(UserError, match=r"holds a run with other settings \(--lr=1e-4, --lr=3e-4\)"):
        sweep(GRID.replace("3e-4", "1e-4"))
    capsys.readouterr()
    assert sweep(GRID, "--markdown", "-") == 0
    assert "| base | 0.2520" in capsys.readouterr().out


def test_a_search_finds_the_best_and_goes_on_after_failures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "ENOUGH", 3)
    text = SEARCH + "search: {lr: [1e-3, 3e-3, 0.9], weight-decay: [0.1, 0.5]}\nsampler: random\ntrials: 12\n"
    assert sweep(text + "seeds: [1, 2]\n") == 0
    rows, said = results(), capsys.readouterr().out
    failed = [row for row in rows if row["status"] == "failed"]
    reasons = {"out of memory on cpu: the largest part of the plan is activations", "val_loss is nan"}
    assert {row["reason"] for row in failed} == reasons
    assert len({row["name"] for row in rows}) == 12
    assert all(row["seed"] == 1 for row in failed), "a trial that failed does not go on with other seeds"
    complete = [row for row in rows if row["status"] == "complete"]
    assert {row["seed"] for row in complete} == {1, 2} and len(rows) == len(failed) + len(complete)
    assert "seed 1: val_loss is nan" in said and ": failed: out of memory" in said
    assert load_config(["--config", str(OUT / "best.yaml")]).lr == 3e-3
    page = (OUT / "sweep.html").read_text()
    assert "val_loss over lr" in page and "PED-ANOVA" in page and "<script>" in page and "http" not in page


def test_an_interrupted_search_continues_as_if_it_had_not_been(monkeypatch: pytest.MonkeyPatch) -> None:
    text = SEARCH + "search: {lr: {low: 1e-4, high: 1e-2, log: true}}\ntrials: 5\nseeds: [1, 2]\n"
    assert sweep(text, "--out", "whole") == 0
    monkeypatch.setenv("STAND_IN_SECONDS", "0.02")
    interrupted_after(4, text)
    assert 3 <= len(results()) < 6
    assert sum(1 for _ in OUT.rglob("step_*")) == 1, "the run under way wrote a checkpoint"
    journal = OUT / "optuna.journal"
    with journal.open("a") as file:
        file.write('{"op_code": 5, "wor')  # as after a kill within a line
    (OUT / "optuna.journal.lock").symlink_to(journal)
    assert sweep(text) == 0
    assert results() == results(Path("whole"))
    assert sorted(starts().values()) == [1] * 9 + [2]
    assert sweep(text) == 0 and sum(starts().values()) == 11
    assert sweep(text.replace("trials: 5", "trials: 6")) == 0 and sum(starts().values()) == 13
    with pytest.raises(UserError, match="holds a sweep with other settings .metric is 'loss', not 'val_loss'"):
        sweep(text + "metric: loss\n")


def test_a_hopeless_trial_is_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_HOPELESS", "3")  # so that it has not ended before it is pruned
    search = "search: {lr: [1e-5, 3e-3]}\nsampler: random\ntrials: 6\npruner: halving\n"
    assert sweep(SEARCH + search + "seeds: [1, 2]\n") == 0
    rows = results()
    assert {row["name"] for row in rows} == {f"trial-{i:04d}" for i in range(6)}
    pruned = [row for row in rows if row["settings"]["lr"] == "1e-5"]
    assert pruned and {(row["status"], row["seed"]) for row in pruned} == {("pruned", 1)}
    assert all(row["step"] <= 5 and row["reason"].endswith("at step 4") for row in pruned)
    assert not list(OUT.rglob("step_*"))


def test_hyperband_has_the_steps_of_a_run_as_its_resource() -> None:
    assert sweep(SEARCH + "search: {lr: {low: 1e-4, high: 1e-2}}\ntrials: 3\npruner: hyperband\n") == 0
    assert len(results()) == 3
    pruner = search.pruner_of(load(Path("sweep.yaml")), candidates(load(Path("sweep.yaml"))))
    assert (pruner._min_resource, pruner._max_resource) == (4, 12)


def test_a_run_that_another_program_stops_is_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_SECONDS", "0.02")
    started = pool.Pool._start

    def start(self: pool.Pool, job: Any, slot: int, attempt: int) -> pool.Running:
        running = started(self, job, slot, attempt)
        if attempt == 1:
            threading.Timer(0.15, running.process.terminate).start()
        return running

    monkeypatch.setattr(pool.Pool, "_start", start)
    assert sweep(GRID.replace("[1, 2, 3]", "[1]")) == 0
    assert [row["status"] for row in results()] == ["complete"] * 2 and set(starts().values()) == {2}


def test_a_folder_that_is_in_use_is_refused() -> None:
    with locked(OUT), pytest.raises(UserError, match="another sweep runs in runs/sweep"):
        sweep(GRID)
    Path("run").mkdir()
    Path("run/run.json").write_text("{}")
    with pytest.raises(UserError, match="run holds a run of fastgpt train"):
        sweep(GRID, "--out", "run")


def test_it_fails_if_every_run_fails() -> None:
    assert sweep(GRID.replace("3e-4", "0.5").replace("base: {}", "base: {lr: 0.9}")) == 1
    assert {row["status"] for row in results()} == {"failed"} and not (OUT / "best.yaml").exists()
