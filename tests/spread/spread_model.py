"""Run by torchrun: the largest differences between a model that is spread over processes and one that is not, as JSON
lines of the main process."""

import json
import sys

import torch

from fastgpt.data.batch import Batch
from fastgpt.distributed.mesh import Mesh, connected, find_mesh
from fastgpt.distributed.parallelize import Spread
from fastgpt.distributed.shards import whole
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.optim import AdamW
from fastgpt.training.task import NextToken

BATCHES, STEPS = 4, 3


def model() -> GPT:
    config = ModelConfig(n_layers=2, n_heads=2, width=32, vocab_size=100, block_size=16)
    return GPT(config, generator=torch.Generator().manual_seed(0))


def difference(mesh: Mesh, kind: str, wide: bool) -> float:
    """Return the largest difference of a weight after some steps, as a share of the largest step that one took."""
    ids = torch.randint(0, 100, (BATCHES, 2, 17), generator=torch.Generator().manual_seed(1))
    alone, spread, start = model(), model(), dict(model().named_parameters())
    task = Spread(NextToken(), spread, mesh, kind, torch.float32 if wide else None)  # type: ignore[arg-type]
    optimizers = [AdamW(m.param_groups(0.1), lr=1e-2, max_norm=0.1) for m in (alone, spread)]
    for _ in range(STEPS):
        for m, objective, mine in (
            (alone, NextToken(), range(BATCHES)),
            (spread, task, range(mesh.rank, BATCHES, mesh.world)),
        ):
            for i in mine:
                if isinstance(objective, Spread):
                    objective.reduces(i + mesh.world >= BATCHES)
                (objective.loss(m, Batch(ids[i, :, :-1], ids[i, :, 1:])) / (BATCHES * 32)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    task.reshard()
    found, expected = whole(dict(spread.named_parameters())), dict(alone.named_parameters())
    norms = [float(optimizer.grad_norm) for optimizer in optimizers]
    worst = max(float((found[n] - expected[n]).abs().max() / (expected[n] - start[n]).abs().max()) for n in found)
    return max(worst, abs(norms[0] / norms[1] - 1))


def main() -> int:
    torch.set_num_threads(1)
    mesh = find_mesh()
    with connected(mesh, torch.device("cpu")):
        for kind in ("ddp", "fsdp"):
            found = difference(mesh, kind, wide=kind == "fsdp")
            ends = mesh.gather(mesh.rank)
            if mesh.main:
                print(json.dumps({"kind": kind, "difference": found, "ranks": ends}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
