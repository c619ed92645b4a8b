"""Training steps in 1 to N processes: `torchrun --nproc-per-node N -m fastgpt.bench.throughput`.

In every round each number of processes n takes three turns. The processes begin a turn together, and it lasts as long
as the slowest of them:

    alone    n independent trainers, each in a process, step side by side
    step     the same n processes train one model (--parallel), each with a batch of the same size
    network  the collectives of such a step alone, started one after another without computation

efficiency: tokens/s of n processes over n times those of one. exposed: share of a step that alone does not take, which
is communication that nothing hides. overhead / network: what a step takes more than alone, as a share of the
collectives; 1 if nothing is hidden and nothing is added. simulated: the step by bench/timeline.py, with bandwidth,
latency and computing speed as they were measured here.

The collectives that a step calls are counted, and compared with the formulas of timeline.py: a difference is an error.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt.bench._harness import Samples, append_rows, provenance, turns, where
from fastgpt.bench.network import Cluster, Collective, Kind
from fastgpt.bench.timeline import Work, collectives, parts_of, simulate
from fastgpt.bench.variants import Shape, batches, settings
from fastgpt.core.device import dtype_of, keep_freed_memory
from fastgpt.distributed.mesh import ALONE, Mesh, connected
from fastgpt.distributed.parallelize import Parallel, Spread
from fastgpt.train import accumulate, forward_backward, optimizer_step
from fastgpt.training.build import build_model, build_optimizer
from fastgpt.training.config import TrainConfig
from fastgpt.training.task import Batch, NextToken

WARM_STEPS = 3  # DDP arranges its buckets after the first
TURNS = ("alone", "step", "network", "small", "large")  # the last two measure latency and bandwidth
KINDS: dict[str, Kind] = {  # of PyTorch's operators
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
}


class Recorder(TorchDispatchMode):
    """Context that records the collectives of this process in `calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and (kind := KINDS.get(func._opname)):
            tensors = args[0] if kind == "all_reduce" else [args[0 if kind == "all_gather" else 1]]
            self.calls.append(Collective(kind, sum(t.nbytes for t in tensors)))
        return func(*args, **(kwargs or {}))


@dataclass
class Trainer:
    """A trainer in this process, alone or as one of a mesh; `step` returns the seconds of the update."""

    cfg: TrainConfig
    mesh: Mesh
    parallel: Parallel
    data: Iterator[tuple[Tensor, Tensor]]
    wait: Callable[[], None]

    def __post_init__(self) -> None:
        device, vocab_size = torch.device(self.cfg.device), int(self.cfg.model.vocab_size or 0)
        self.model = build_model(self.cfg, vocab_size, device, self.mesh)
        self.task: Any = NextToken()
        if self.mesh.world > 1:
            self.task = Spread(self.task, self.model, self.mesh, self.parallel)
        self.optimizer = build_optimizer(self.cfg, self.model)

    def step(self) -> float:
        """Run a step as the loop of fastgpt/train.py does."""
        found = [Batch(*next(self.data)) for _ in range(self.cfg.accumulation)]
        micro_step = lambda i, *batch: forward_backward(self.model, self.task, None, *batch)  # noqa: E731
        loss = accumulate(self.task, self.mesh, found, micro_step)
        loss = self.mesh.sum(torch.cat((loss, loss.new_zeros(2))))[:1]
        self.wait()
        begin = time.perf_counter()
        optimizer_step(self.optimizer, None, None, loss)
        self.wait()
        return time.perf_counter() - begin


def replay(calls: list[Collective], mesh: Mesh, device: torch.device) -> Callable[[], None]:
    """Return a function that makes these calls, one after another, and waits for all of them."""
    shares = [math.ceil(call.size / 4 / mesh.world) for call in calls]  # elements of each process, fp32
    whole = [torch.zeros(n * mesh.world, device=device) for n in shares]
    parts = [torch.zeros(n, device=device) for n in shares]

    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    def start(kind: Kind, t: Tensor, part: Tensor) -> Any:
        if kind == "all_reduce":
            return dist.all_reduce(t, group=mesh.group, async_op=True)
        first, second = (t, part) if kind == "all_gather" else (part, t)
        return (gather if kind == "all_gather" else scatter)(first, second, group=mesh.group, async_op=True)

    def run() -> None:
        for work in [start(call.kind, t, part) for call, t, part in zip(calls, whole, parts, strict=True)]:
            work.wait()

    return run


@dataclass
class Count:
    """What is measured at one number of processes; the turns are in `samples`, the update of `alone` in `update`."""

    mesh: Mesh  # whose rank is negative in the processes that only wait
    calls: list[Collective]
    turns: dict[str, Callable[[], Any]]
    samples: dict[str, Samples] = field(default_factory=dict)
    update: list[float] = field(default_factory=list)


def prepare(alone: Trainer, mesh: Mesh, parallel: Parallel) -> Count:
    """Build the trainer of this process for one number of processes, run its first steps and count the calls."""
    device = torch.device(alone.cfg.device)
    several = replace(alone, mesh=mesh, parallel=parallel) if mesh.world > 1 else alone
    for _ in range(WARM_STEPS):
        several.step()
    with Recorder() as recorder:
        several.step()
    made: dict[str, Callable[[], Any]] = {"alone": alone.step}
    if mesh.world > 1:
        made |= {"step": several.step, "network": replay(recorder.calls, mesh, device)}
        for name, size in (("small", 8), ("large", 16 << 20)):
            made[name] = replay([Collective("all_reduce", size)], mesh, device)
    return Count(mesh, recorder.calls, made)


def measure(counts: dict[int, Count], mesh: Mesh, rounds: int, wait: Callable[[], None]) -> None:
    """Time the turns of every number of processes; every process calls it."""
    slowest = torch.zeros(1, dtype=torch.float64)
    if dist.get_backend() == "nccl":
        slowest = slowest.to(torch.device("cuda", mesh.local))
    for number in range(rounds):
        for n, count in counts.items():
            for name in turns(list(TURNS if n > 1 else TURNS[:1]), number):
                dist.barrier()
                begin, update = time.perf_counter(), None
                if count.mesh.rank >= 0:
                    update = count.turns[name]()
                wait()
                slowest.fill_(time.perf_counter() - begin if count.mesh.rank >= 0 else 0.0)
                dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
                count.samples.setdefault(name, Samples()).seconds.append(float(slowest))
                if name == "alone" and update is not None:
                    count.update.append(update)


def row(cfg: TrainConfig, parallel: Parallel, count: Count, one: Samples) -> dict[str, Any]:
    """Return the figures of one number of processes. one: samples of a process alone."""
    n, alone, tokens = count.mesh.world, count.samples["alone"], cfg.batch_tokens
    step = count.samples.get("step", alone)
    middle = step.quantile(0.5)
    made: dict[str, Any] = {"bench": "processes", "variant": parallel, "processes": n, **step.figures()}
    made |= {"tokens_per_s": n * tokens / middle, "efficiency": one.shares(step).quantile(0.5)}
    if n == 1:
        return made
    network = count.samples["network"]
    overhead = Samples([s - a for s, a in zip(step.seconds, alone.seconds, strict=True)])
    made |= {"alone_ms": 1e3 * alone.quantile(0.5), "network_ms": 1e3 * network.quantile(0.5)}
    made |= {"exposed": overhead.shares(step).quantile(0.5), "overhead_ms": 1e3 * overhead.quantile(0.5)}
    made["overhead_over_network"] = [overhead.shares(network).quantile(q) for q in (0.5, 0.2, 0.8)]
    work, cluster = constants(cfg, count)
    made["simulated_ms"] = 1e3 * simulate(work, cluster, parallel, n).seconds
    made |= {"latency_us": 1e6 * cluster.hop[0], "bandwidth_gb_s": cluster.inside / 1e9}
    expected = collectives(work, parallel, n)
    made |= {"calls": len(count.calls), "bytes": sum(call.size for call in count.calls)}
    if Counter(expected) != Counter(count.calls):
        made["red"] = f"collectives are {sorted(count.calls)}, expected {sorted(expected)}"
    return made


def constants(cfg: TrainConfig, count: Count) -> tuple[Work, Cluster]:
    """Return what the simulation needs, from the samples: computing speed, bandwidth and latency."""
    n, update = count.mesh.world, Samples(count.update).quantile(0.5)
    parts = parts_of(cfg.model, cfg.block_size)
    tokens = cfg.sequences * cfg.block_size
    flops = 3 * sum(part.flops for part in parts) * tokens * cfg.accumulation
    rate = flops / (count.samples["alone"].quantile(0.5) - update)
    itemsize = dtype_of(cfg.dtype, torch.device(cfg.device).type).itemsize
    work = Work(parts, itemsize, tokens, cfg.accumulation, rate, update=update)
    large = Collective("all_reduce", 16 << 20)
    small = count.samples["small"].quantile(0.5)
    bandwidth = large.sent(n) / max(1e-9, count.samples["large"].quantile(0.5) - small)
    hop = small / large.steps(n)
    return work, Cluster("here", 0.0, 0.0, n, bandwidth, bandwidth, base=0.0, hop=(hop, hop), tree=None)


def sizes(world: int) -> list[int]:
    """Return the numbers of processes that are measured: powers of two, and all."""
    return [*(n for n in (2**i for i in range(world.bit_length())) if n < world), world]


def show(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table."""
    head = f"{'processes':<11}{'ms/step':>9}{'alone':>9}{'network':>9}{'tokens/s':>11}{'each':>10}{'efficiency':>12}"
    lines = [head + f"{'exposed':>9}{'simulated ms':>14}  overhead / network (20 .. 80 %)"]
    for r in rows:
        n, each = r["processes"], r["tokens_per_s"] / r["processes"]
        alone, network = (f"{r[k]:.1f}" if k in r else "-" for k in ("alone_ms", "network_ms"))
        start = f"{n:<11}{r['ms']:>9.1f}{alone:>9}{network:>9}{r['tokens_per_s']:>11,.0f}{each:>10,.0f}"
        start += f"{r['efficiency']:>12.1%}"
        if n > 1:
            middle, low, high = r["overhead_over_network"]
            start += f"{r['exposed']:>9.1%}{r['simulated_ms']:>14.1f}  {middle:.2f} ({low:.2f} .. {high:.2f})"
        lines.append(start)
    for r in (r for r in rows if r["processes"] > 1):
        lines.append(
            f"{r['processes']} processes: {r['calls']} collectives of {r['bytes'] / 1e6:.2f} MB a step"
            f"{', as the formulas say' if 'red' not in r else ': ' + r['red']}; measured latency of a step of a ring "
            f"{r['latency_us']:.0f} us, bandwidth {r['bandwidth_gb_s']:.2f} GB/s"
        )
    return "\n".join(lines)


def of_shape(mesh: Mesh, device: torch.device, shape: Shape, parallel: Parallel) -> list[dict[str, Any]]:
    """Measure one shape; every process calls it. The first one returns the rows, the others none."""
    cfg = settings(shape, device)
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    found = batches(shape, device)
    begin = mesh.rank % len(found)
    alone = Trainer(cfg, ALONE, parallel, itertools.cycle(found[begin:] + found[:begin]), wait)
    counts = {}
    for n in sizes(mesh.world):
        group = dist.new_group(list(range(n))) if n < mesh.world else None
        part = Mesh(mesh.rank if mesh.rank < n else -1, n, mesh.local, group)
        counts[n] = prepare(alone, part, parallel) if part.rank >= 0 else Count(part, [], {})
        dist.barrier()
    measure(counts, mesh, shape.steps, wait)
    one = counts[1].samples["alone"]
    return [row(cfg, parallel, count, one) for count in counts.values()] if mesh.main else []


def main(mesh: Mesh, device: torch.device, shapes: dict[str, Shape], parallel: Parallel, path: Path | None) -> int:
    """Measure in the processes of torchrun; the first one prints the tables. Return 1 if collectives are wrong."""
    device, status = mesh.device(device), 0
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    with connected(mesh, device):
        for name, shape in shapes.items():
            rows = of_shape(mesh, device, shape, parallel)
            if not rows:
                continue
            about: dict[str, Any] = {"shape": name, "batch": shape.batch, "block": shape.block}
            about["machine"] = provenance(device)
            print(f"{name}, {parallel}: B {shape.batch} x T {shape.block} in each process, {where(about['machine'])}")
            print(show(rows), flush=True)
            if path is not None:
                append_rows(path, [{**about, **r} for r in rows])
            status |= int(any("red" in r for r in rows))
    return status
