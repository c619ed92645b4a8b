"""Sharded checkpoints: what FSDP2 spreads over processes is written and read in pieces."""

import json
from pathlib import Path

import pytest
import torch
from spread.launch import script, torchrun

from fastgpt.core import tensorfile
from fastgpt.core.errors import UserError
from fastgpt.core.tensorpieces import metadata_of, open_pieces
from fastgpt.training import checkpoint

WHOLE = {"rows": torch.arange(15.0).view(5, 3), "columns": torch.arange(8).view(2, 4), "scalar": torch.tensor(2.5)}


def write_pieces(folder: Path) -> list[Path]:
    """Write WHOLE in three files: a tensor by rows, with no row for the last, another by columns."""
    rows, columns = WHOLE["rows"], WHOLE["columns"]
    files = [
        ({"rows": rows[:3], "columns": columns[:, 3:], "scalar": WHOLE["scalar"]}, {"rows": [0, 0], "columns": [0, 3]}),
        ({"rows": rows[3:], "columns": columns[:, :3]}, {"rows": [3, 0], "columns": [0, 0]}),
        ({"rows": rows[5:]}, {"rows": [5, 0]}),
    ]
    paths = []
    for i, (tensors, offsets) in enumerate(files):
        begins = {name: offsets.get(name, []) for name in tensors}
        paths.append(folder / f"shard-{i}.safetensors")
        tensorfile.save_file({name: t.contiguous() for name, t in tensors.items()}, paths[-1], metadata_of(begins))
    return paths


def test_pieces_make_whole_tensors(tmp_path: Path) -> None:
    paths = write_pieces(tmp_path)
    found = open_pieces(paths)
    assert {name: pieces.shape for name, pieces in found.items()} == {name: tuple(t.shape) for name, t in WHOLE.items()}
    for name, expected in WHOLE.items():
        got = found[name].read()
        assert torch.equal(got, expected) and got.dtype == expected.dtype
    with pytest.raises(UserError, match="the pieces of columns do not make a whole tensor"):
        open_pieces([paths[0], paths[2]])


def test_pytorch_reads_the_pieces(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    write_pieces(tmp_path)
    got = {name: torch.zeros_like(t) for name, t in WHOLE.items()}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(got, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)))
    assert all(torch.equal(got[name], t) for name, t in WHOLE.items())


def test_processes_write_and_read_their_pieces(tmp_path: Path) -> None:
    done = torchrun(2, script("spread_shards.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    shards = [f"{kind}.{rank}-of-2.safetensors" for kind in ("model", "optimizer") for rank in (0, 1)]
    assert said["done"] == ["step_00000001"] and said["files"] == [*shards, "state.json"]
    assert said["whole"] == [True, True] and said[checkpoint.MODEL] and said[checkpoint.OPTIMIZER]
    none, dtype, shape, missing, more = said["refusals"]
    name = said["name"]
    assert not none and f"has {name} in torch.bfloat16, expected torch.float32" in dtype
    assert f"has {name} of shape (7,), expected" in shape
    assert missing.endswith(f"has no tensor that the model has: {name}")
    assert more.endswith("has a tensor that the model does not have: more")
    for text in said["full"]:
        assert "step_00000002 could not be written (process 1: No space left on device); earlier" in text
    assert said["left"] == ["step_00000001"], "a failed checkpoint leaves nothing"


@pytest.mark.parametrize("damage", ["absent", "short", "changed"])
def test_a_damaged_shard_is_named(damage: str, tmp_path: Path) -> None:
    run, files = tmp_path / "run", {}
    draft = checkpoint.Draft(run, 1)
    draft.begin()
    for i, part in enumerate((WHOLE["rows"][:3], WHOLE["rows"][3:])):
        name = f"model.{i}-of-2.safetensors"
        files[name] = draft.write(name, {"rows": part}, metadata_of({"rows": [3 * i, 0]}))
    draft.complete(files, {}, 0)
    path = checkpoint.find(run)
    state = checkpoint.read_state(path)
    assert torch.equal(checkpoint.read_tensors(path, checkpoint.MODEL, state)["rows"], WHOLE["rows"])
    second = path / "model.1-of-2.safetensors"
    raw = second.read_bytes()
    second.unlink()
    if damage != "absent":
        second.write_bytes(raw[:-4] if damage == "short" else raw[:-1] + bytes([raw[-1] ^ 1]))
    what = {"absent": f"{second.name} is missing", "short": f"{second.name} has", "changed": f"of {second.name} has"}
    with pytest.raises(UserError, match=f"damaged: .*{what[damage]}"):
        checkpoint.open_tensors(path, checkpoint.MODEL, state)
