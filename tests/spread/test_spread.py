import json

import pytest
from spread.launch import script, torchrun

from fastgpt.core.errors import UserError
from fastgpt.distributed.mesh import ALONE, Mesh, find_mesh


@pytest.mark.parametrize("count", [2, 4])
def test_a_model_over_processes_learns_as_in_one(count: int) -> None:
    done = torchrun(count, script("spread_model.py"))
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["kind"] for row in rows] == ["ddp", "fsdp"], done.stderr
    for row in rows:  # Adam divides gradients by their size, so rounding may show in small ones
        assert row["difference"] < 1e-3 and row["ranks"] == list(range(count))


def test_the_environment_describes_the_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert find_mesh() is ALONE
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert find_mesh() == Mesh(3, 4, 1)
    monkeypatch.setenv("RANK", "")
    with pytest.raises(UserError, match="expected torchrun"):
        find_mesh()
