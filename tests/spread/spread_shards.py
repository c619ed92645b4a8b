"""Run by torchrun in two processes: write and read sharded checkpoints of a model under FSDP2; the main process prints
what holds, as JSON."""

import dataclasses
import errno
import json
import sys
from pathlib import Path
from typing import Any

import torch

from fastgpt.core.errors import UserError
from fastgpt.data.batch import Batch
from fastgpt.distributed.mesh import Mesh, connected, find_mesh
from fastgpt.distributed.parallelize import Spread
from fastgpt.distributed.shards import whole
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.optim import AdamW
from fastgpt.training import checkpoint, sharded
from fastgpt.training.checkpoint import MODEL, OPTIMIZER
from fastgpt.training.task import NextToken


def trained(mesh: Mesh) -> tuple[Any, AdamW]:
    """Return a model under FSDP2 and its optimizer after a step."""
    config = ModelConfig(n_layers=2, n_heads=2, width=32, vocab_size=101, vocab_multiple=1, block_size=16)
    spread = GPT(config, generator=torch.Generator().manual_seed(0))
    task = Spread(NextToken(), spread, mesh, "fsdp")
    optimizer = AdamW(spread.param_groups(0.1), lr=1e-2)
    ids = torch.randint(0, 100, (2, 17), generator=torch.Generator().manual_seed(mesh.rank))
    task.loss(spread, Batch(ids[:, :-1], ids[:, 1:])).sum().backward()
    optimizer.step()
    task.reshard()
    return spread, optimizer


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    same = (t.dtype == found[name].dtype and torch.equal(t, found[name]) for name, t in expected.items())
    return found.keys() == expected.keys() and all(same)


def refusal(path: Path, found: dict[str, Any], own: dict[str, Any]) -> str:
    try:
        sharded.require_fit(path, found, own)
    except UserError as e:
        return str(e)
    return ""


def disk_full(mesh: Mesh, writer: sharded.ShardedWriter, run: Path, tensors: dict[str, Any]) -> str:
    """Return the error of a checkpoint whose second process cannot write."""
    write = checkpoint.Draft.write

    def fails(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint.Draft.write = fails if mesh.rank else write  # type: ignore[method-assign]
    writer.save(run, 2, tensors, {}, {}, 0)
    try:
        writer.finished(wait=True)
    except UserError as e:
        return str(e)
    finally:
        checkpoint.Draft.write = write  # type: ignore[method-assign]
    return ""


def checks(mesh: Mesh, run: Path) -> dict[str, Any]:
    spread, optimizer = trained(mesh)
    weights = spread.state_dict()
    moments = checkpoint.flatten_optimizer(optimizer, spread.named_parameters())
    expected = {MODEL: whole(weights), OPTIMIZER: whole(moments)}
    expected = {kind: {name: t.clone() for name, t in tensors.items()} for kind, tensors in expected.items()}
    writer = sharded.ShardedWriter(mesh)
    writer.save(run, 1, weights, moments, {"note": 1}, 0)
    with torch.no_grad():  # as training goes on while the thread writes
        for t in (*weights.values(), *moments.values()):
            t.zero_()
    said: dict[str, Any] = {"done": [p.name for p in writer.finished(wait=True)]}
    path = checkpoint.find(run)
    state = checkpoint.read_state(path)
    said["files"] = sorted(p.name for p in path.iterdir())
    said["whole"] = [equal(checkpoint.read_tensors(path, kind, state), expected[kind]) for kind in expected]
    owners = dict(spread.named_parameters())
    for kind in expected:
        found = checkpoint.open_tensors(path, kind, state, mesh)
        like = {name: owners.get(name, owners.get(name.rpartition(".")[0])) for name in found}
        parts = sharded.load(found, {name: t for name, t in like.items() if t is not None})
        spread_out = [hasattr(t, "placements") for t in parts.values() if t.dim()]
        said[kind] = equal(whole(parts), expected[kind]) and all(spread_out)
    found = checkpoint.open_tensors(path, MODEL, state, mesh)
    name = "blocks.0.norm1.weight" if "blocks.0.norm1.weight" in found else next(iter(found))
    half, other = dataclasses.replace(found[name], dtype="BF16"), dataclasses.replace(found[name], shape=(7,))
    fewer = {key: pieces for key, pieces in found.items() if key != name}
    changed = ({**found, name: half}, {**found, name: other}, fewer, {**found, "more": half})
    said["name"], said["refusals"] = name, [refusal(path, each, weights) for each in ({**found}, *changed)]
    said["full"] = mesh.gather(disk_full(mesh, writer, run, weights))
    said["left"] = sorted(p.name for p in run.iterdir())
    return said


def main() -> int:
    torch.set_num_threads(1)
    mesh = find_mesh()
    with connected(mesh, torch.device("cpu")):
        said = checks(mesh, Path(sys.argv[1]))
        if mesh.main:
            print(json.dumps(said), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
