"""Run by torchrun: the collectives that the trainer calls in some steps and those that the model of a step expects, and
the rows of the benchmark of processes, as JSON lines of the main process."""

import json
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from fastgpt import train
from fastgpt.bench.network import Collective
from fastgpt.bench.processes import Recorder, of_shape
from fastgpt.bench.timeline import Work, collectives, parts_of
from fastgpt.bench.variants import Shape
from fastgpt.distributed.mesh import Mesh, connected, find_mesh
from fastgpt.models.config import ModelConfig
from fastgpt.training.config import TrainConfig

STEPS, MICRO_BATCHES = 3, 2
SHAPE = Shape(layers=2, heads=2, width=64, vocab=64, block=16, batch=2, steps=2)


def settings(out: str, data: str, kind: str, processes: int) -> TrainConfig:
    """Return those of a model whose gradients fill four buckets, the last of positions alone, and whose embedding has
    an odd number of rows."""
    sizes: dict[str, Any] = dict(n_layers=5, n_heads=6, n_kv_heads=2, width=384, block_size=8)
    model = ModelConfig(**sizes, vocab_size=20_001, vocab_multiple=1, tied=kind == "ddp")
    return TrainConfig(
        model=model,
        data=data,
        out=f"{out}/{kind}",
        device="cpu",
        parallel=kind,  # type: ignore[arg-type]
        block_size=8,
        micro_batch=1,
        batch_tokens=8 * MICRO_BATCHES * processes,
        max_steps=STEPS,
        warmup_steps=1,
        eval_every=0,
        save_every=0,
    )


def counted(cfg: TrainConfig) -> Counter[Collective]:
    """Train; return the calls of all steps."""
    loop, recorder = train.loop, Recorder()

    def recorded(*arguments: Any) -> None:
        with recorder:
            loop(*arguments)

    train.loop = recorded
    try:
        run = train.prepare(cfg)
        train.drive(run, lambda run, log: 0, "again")
    finally:
        train.loop = loop
    return Counter(recorder.calls)


def expected(cfg: TrainConfig, mesh: Mesh) -> Counter[Collective]:
    """Return the calls by the formulas. DDP sums all gradients at once before its first step, to order its buckets."""
    work = Work(parts_of(cfg.model, cfg.block_size), 4, cfg.block_size, MICRO_BATCHES, 1e9)
    step = Counter(collectives(work, cfg.parallel, mesh.world))
    total = Counter({call: STEPS * count for call, count in step.items()})
    if cfg.parallel == "ddp":
        assert len(step) == 2 + 4, "four buckets"
        total += Counter([Collective("all_reduce", 4 * work.parameters)])
    return total


def main(out: str, data: str) -> int:
    torch.set_num_threads(1)
    mesh, device = find_mesh(), torch.device("cpu")
    with connected(mesh, device):
        for kind in ("ddp", "fsdp"):
            cfg = settings(out, data, kind, mesh.world)
            found, right = counted(cfg), expected(cfg, mesh)
            rows = of_shape(mesh, device, replace(SHAPE, batch=1), kind)  # type: ignore[arg-type]
            if mesh.main:
                lists = [sorted([*call, count] for call, count in calls.items()) for calls in (found, right)]
                print(json.dumps({"kind": kind, "found": lists[0], "expected": lists[1], "rows": rows}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
