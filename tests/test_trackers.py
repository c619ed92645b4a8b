"""Trackers and profiles of a run: what they receive, and that a failing one does not end the run."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt.core.device import energy_joules
from fastgpt.core.errors import UserError
from fastgpt.training.profiling import Profile
from fastgpt.training.trackers import Trackers


class Wandb(types.ModuleType):
    """Stand-in for wandb and trackio; raises at call number `fails` of log."""

    def __init__(self, fails: int = 0) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.ended, self.fails = 0, fails

    def init(self, **settings: Any) -> Wandb:
        self.started.append(settings)
        return self

    def log(self, row: dict[str, float], step: int) -> None:
        if len(self.rows) + 1 == self.fails:
            raise ConnectionError("no network")
        self.rows.append((step, row))

    def finish(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_figures_arrive(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Wandb()
    monkeypatch.setitem(sys.modules, name, fake)
    trackers = Trackers([name], tmp_path / "run", {"lr": 1.0})
    for step in (1, 2):
        trackers.put({"step": step, "loss": 2.5, "tokens": 10, "note": "text"})
    trackers.close()
    assert fake.started[0]["name"] == "run" and fake.started[0]["config"] == {"lr": 1.0}
    assert fake.rows == [(step, {"loss": 2.5, "tokens": 10.0}) for step in (1, 2)] and fake.ended == 1


def test_tensorboard_gets_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            calls.append((folder,))

        def add_scalar(self, *what: Any) -> None:
            calls.append(what)

        def close(self) -> None:
            calls.append(("close",))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    trackers = Trackers(["tensorboard"], tmp_path, {})
    trackers.put({"step": 3, "loss": 1.0})
    trackers.close()
    assert calls == [(str(tmp_path / "tensorboard"),), ("loss", 1.0, 3), ("close",)]


def test_a_failing_tracker_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing, whole = Wandb(fails=2), Wandb()
    monkeypatch.setitem(sys.modules, "wandb", failing)
    monkeypatch.setitem(sys.modules, "trackio", whole)
    with caplog.at_level(logging.WARNING):
        trackers = Trackers(["wandb", "trackio"], tmp_path, {})
        for step in range(1, 5):
            trackers.put({"step": step, "loss": 1.0})
        trackers.close()
    assert len(failing.rows) == 1 and len(whole.rows) == 4 and (failing.ended, whole.ended) == (0, 1)
    assert caplog.text.count("wandb failed (ConnectionError: no network)") == 1


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="track: trackio is not installed .*; pip install trackio"):
        Trackers(["trackio"], tmp_path, {})


def test_profile_covers_the_steps_it_was_asked_for(tmp_path: Path) -> None:
    watch, said = Profile("2:3", "torch", tmp_path, torch.device("cpu")), []
    for step in range(1, 6):
        watch.before(step)
        with torch.profiler.record_function(f"this is step {step}"):
            torch.ones(3) + step
        said.append(watch.after(step))
    names = {e["name"] for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {f"this is step {s}" for s in (2, 3)} <= names and not {f"this is step {s}" for s in (1, 4, 5)} & names
    assert "aten::add" in (tmp_path / "profile.txt").read_text()
    assert [bool(s) for s in said] == [False, False, True, False, False]


def test_a_run_that_ends_early_leaves_its_profile(tmp_path: Path) -> None:
    watch = Profile("1:100", "torch", tmp_path, torch.device("cpu"))
    watch.before(1)
    torch.ones(3) + 1
    assert not watch.after(1) and watch.close() and (tmp_path / "trace.json").exists() and not watch.close()


def test_nsys_is_shown_the_steps_and_their_ops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: seen.append(name))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("wait"))

    @contextlib.contextmanager
    def ranges() -> Iterator[None]:
        seen.append("ranges")
        yield
        seen.append("no ranges")

    monkeypatch.setattr("fastgpt.training.profiling.emit_nvtx", ranges)
    watch, said = Profile("2:3", "nsys", tmp_path, torch.device("cuda")), []
    for step in range(1, 5):
        watch.before(step)
        seen.append(f"step {step}")
        said.append(watch.after(step))
    between = ["start", "ranges", "step 2", "step 3", "wait", "no ranges", "stop"]
    assert seen == ["step 1", *between, "step 4"]
    assert said == ["", "", "profile: steps 2 to 3 are marked, and their ops are NVTX ranges", ""]
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="profiler is 'nsys', expected torch on a CPU"):
        Profile("2:3", "nsys", tmp_path, torch.device("cpu"))


def test_energy_is_read_from_the_gpu_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    library = types.ModuleType("pynvml")
    library.nvmlInit = lambda: None  # type: ignore[attr-defined]
    library.nvmlDeviceGetHandleByUUID = lambda uuid: uuid.decode()  # type: ignore[attr-defined]
    library.nvmlDeviceGetTotalEnergyConsumption = {"GPU-ab-cd": 12_500}.__getitem__  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", library)
    properties = types.SimpleNamespace(uuid="ab-cd")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert energy_joules(torch.device("cuda", 1)) == 12.5
    properties.uuid = "another"
    assert energy_joules(torch.device("cuda", 1)) is None, "whatever goes wrong, the run goes on"
    assert energy_joules(torch.device("cpu")) is None
