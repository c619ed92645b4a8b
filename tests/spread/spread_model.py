"""Run by torchrun: how a model that is spread over processes learns beside one that is not, as JSON lines of the main
process."""

import json
import sys
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastgpt.data.batch import Batch
from fastgpt.distributed.mesh import Mesh, connected, find_mesh
from fastgpt.distributed.parallelize import Parallel, Spread
from fastgpt.distributed.shards import share, whole
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.optim import AdamW, MuonAdamW
from fastgpt.optim import spread as optim_spread
from fastgpt.optim.newton_schulz import orthogonalise
from fastgpt.training.checkpoint import flatten_optimizer, unflatten_optimizer
from fastgpt.training.task import NextToken

BATCHES, ROWS, BLOCK = 4, 2, 16
STEPS = {"adamw": 3, "muon": 10}


class Side:
    """A model, its optimizer, and the batches of each step that this process trains on."""

    def __init__(self, mesh: Mesh, optimizer: str, kind: Parallel | None = None, dtype: torch.dtype = torch.float32):
        config = ModelConfig(n_layers=2, n_heads=2, width=32, vocab_size=100, block_size=BLOCK)
        self.model = GPT(config, generator=torch.Generator().manual_seed(0)).to(dtype)
        self.mesh, self.task = mesh, NextToken()
        self.mine = range(BATCHES)
        if kind is not None:
            self.task: Any = Spread(NextToken(), self.model, mesh, kind, torch.float32 if kind == "fsdp" else None)
            self.mine = range(mesh.rank, BATCHES, mesh.world)
        options: dict[str, Any] = dict(lr=1e-2, max_norm=0.1)
        groups = self.model.param_groups(0.1, muon=optimizer == "muon")
        muon = {"replicated": kind == "ddp"}
        self.optimizer = AdamW(groups, **options) if optimizer == "adamw" else MuonAdamW(groups, **options, **muon)

    def step(self) -> float:
        """Train one step; return the loss over all batches."""
        ids = torch.randint(0, 100, (BATCHES, ROWS, BLOCK + 1), generator=torch.Generator().manual_seed(1))
        total = torch.zeros(1)
        for i in self.mine:
            if isinstance(self.task, Spread):
                self.task.reduces(i + self.mesh.world >= BATCHES)
            batch = Batch(ids[i, :, :-1], ids[i, :, 1:])
            loss = (self.task.loss(self.model, batch) / (BATCHES * ROWS * BLOCK)).sum()
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(self.mesh.sum(total) if isinstance(self.task, Spread) else total)

    def weights(self) -> dict[str, Tensor]:
        if isinstance(self.task, Spread):
            self.task.reshard()
        return whole({name: p.detach() for name, p in self.model.named_parameters()})

    def state(self) -> dict[str, Tensor]:
        return whole(flatten_optimizer(self.optimizer, self.model.named_parameters()))

    def load(self, other: "Side") -> None:
        """Load weights and optimizer from another side, as a checkpoint holds them."""
        weights, state, own = other.weights(), other.state(), dict(self.model.named_parameters())
        self.model.load_state_dict({name: share(t, own[name]) for name, t in weights.items()}, strict=False)
        state = {name: share(t, own[name.rpartition(".")[0]]) for name, t in state.items()}
        unflatten_optimizer(self.optimizer, state, self.model.named_parameters())


def compare(mesh: Mesh, optimizer: str, kind: Parallel) -> dict[str, Any]:
    """Return the largest differences from a model in one process: of losses and gradient norms as shares of them, and
    of weights as shares of the largest change of one."""
    alone, spread = Side(mesh, optimizer), Side(mesh, optimizer, kind)
    start = {name: t.clone() for name, t in alone.weights().items()}
    losses = [(alone.step(), spread.step()) for _ in range(STEPS[optimizer])]
    found, wanted = spread.weights(), alone.weights()
    norms = float(alone.optimizer.grad_norm), float(spread.optimizer.grad_norm)
    return {
        "weights": max(float((found[n] - t).abs().max() / (t - start[n]).abs().max()) for n, t in wanted.items()),
        "losses": max(abs(b / a - 1) for a, b in [*losses, norms]),
    }


def resumes(mesh: Mesh, optimizer: str, kind: Parallel) -> bool:
    """Return whether a bf16 model that was saved and loaded goes on with the same bits, state included."""
    sides = [Side(mesh, optimizer, kind, torch.bfloat16) for _ in range(2)]
    for _ in range(2):
        sides[0].step()
    sides[1].load(sides[0])
    losses = [[side.step() for _ in range(2)] for side in sides]
    (a, b), (c, d) = [side.weights() for side in sides], [side.state() for side in sides]
    equal = [torch.equal(a[n], b[n]) for n in a] + [torch.equal(c[n], d[n]) for n in c]
    return losses[0] == losses[1] and c.keys() == d.keys() and all(equal)


def uneven(mesh: Mesh) -> bool:
    """Return whether matrices of which some processes have few or no rows are orthogonalised as in one process, each of
    them once."""
    calls: list[Tensor] = []
    fits = True

    def counted(matrices: Sequence[Tensor], precision: torch.dtype) -> list[Tensor]:
        calls.extend(matrices)
        return orthogonalise(matrices, precision)

    shapes = [(7, 3), (8, 16), (8, 16), (16, 8), (1, 5), (9, 9)]
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        matrices = [torch.randn(shape, generator=generator) for shape in shapes]
        wanted = orthogonalise(matrices, dtype)
        rows, mine = (
            [[*m.chunk(mesh.world), *(mesh.world * [m[:0]])][mesh.rank] for m in ms] for ms in (matrices, wanted)
        )
        with mock.patch.object(optim_spread, "orthogonalise", counted):
            found = optim_spread.orthogonalise_copies(matrices, dtype)
            shards = optim_spread.orthogonalise_shards(rows, shapes, dtype, None)
        for a, b in zip([*found, *shards], [*wanted, *mine], strict=True):
            fits = fits and a.dtype == dtype and torch.allclose(a, b, rtol=1e-2, atol=8 * torch.finfo(dtype).eps)
    once = int(mesh.sum(torch.tensor(len(calls)))) == 2 * 2 * len(shapes)  # copies and shards in two dtypes
    return fits and once


def main() -> int:
    torch.set_num_threads(1)
    mesh = find_mesh()
    with connected(mesh, torch.device("cpu")):
        kinds: tuple[Parallel, ...] = ("ddp", "fsdp")
        fits = all(mesh.gather(uneven(mesh)))
        for optimizer in STEPS:
            for kind in kinds:
                row = {"kind": kind, "optimizer": optimizer, **compare(mesh, optimizer, kind)}
                if optimizer == "muon":  # test_spread_train.py has AdamW's
                    row |= {"resumes": resumes(mesh, optimizer, kind), "uneven": fits}
                row["ranks"] = mesh.gather(mesh.rank)
                if mesh.main:
                    print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
