import json

import pytest
import torch
from spread.launch import script, torchrun

from fastgpt.core.errors import UserError
from fastgpt.distributed.mesh import ALONE, Mesh, find_mesh
from fastgpt.optim import MuonAdamW
from fastgpt.training.build import build_model, build_optimizer
from fastgpt.training.config import load_config


@pytest.mark.parametrize("count", [2, 4])
def test_a_model_over_processes_learns_as_in_one(count: int) -> None:
    done = torchrun(count, script("spread_model.py"))
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    every = [(optimizer, kind) for optimizer in ("adamw", "muon") for kind in ("ddp", "fsdp")]
    assert [(row["optimizer"], row["kind"]) for row in rows] == every, done.stderr
    for row in rows:  # Adam divides gradients by their size, so rounding may show in small ones
        assert row["weights"] < 1e-3 and row["losses"] < 1e-5, row
        if row["optimizer"] == "muon":
            assert row["uneven"] and row["resumes"], row
        assert row["ranks"] == list(range(count))


def test_muon_shares_its_work_where_processes_hold_copies() -> None:
    settings = ["--config", "tiny", "--optimizer", "muon", "--model.n-layers", "1"]
    for parallel, mesh, replicated in (("ddp", Mesh(0, 2), True), ("fsdp", Mesh(0, 2), False), ("ddp", ALONE, False)):
        cfg = load_config([*settings, "--parallel", parallel])
        optimizer = build_optimizer(cfg, build_model(cfg, 60, torch.device("cpu")), mesh)
        assert isinstance(optimizer, MuonAdamW) and optimizer.replicated == replicated


def test_the_environment_describes_the_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert find_mesh() is ALONE
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert find_mesh() == Mesh(3, 4, 1)
    monkeypatch.setenv("RANK", "")
    with pytest.raises(UserError, match="expected torchrun"):
        find_mesh()
