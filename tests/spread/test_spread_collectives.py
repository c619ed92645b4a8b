"""What the trainer sends in real runs is what the model of a step says."""

import json
from pathlib import Path

import pytest
import torch
from spread.launch import script, torchrun


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.extended)])
def test_the_collectives_of_real_steps_are_those_of_the_formulas(count: int, tmp_path: Path) -> None:
    data = tmp_path / "ids_uint32.bin"
    data.write_bytes(torch.randint(63, (4000,), dtype=torch.int32).numpy())
    done = torchrun(count, script("spread_collectives.py"), str(tmp_path), str(data))
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"kind"')]
    assert [each["kind"] for each in found] == ["ddp", "fsdp"], done.stdout + done.stderr
    for each in found:
        assert each["found"] == each["expected"], each["kind"]
        rows = {row["processes"]: row for row in each["rows"]}
        assert list(rows) == ([1, 2] if count == 2 else [1, 2, 4])
        assert not [row["red"] for row in rows.values() if "red" in row]
        for n in list(rows)[1:]:
            assert rows[n]["calls"] > 2 and rows[n]["simulated_ms"] > 0.0 and len(rows[n]["overhead_over_network"]) == 3
