"""A simulated training step under DDP or FSDP2: what each process computes, which collectives it calls, and when.

A GPU computes and communicates at the same time; each of both does one thing after another, in the order in which the
host launches it.

    ddp    the last backward of a step closes a bucket of gradients with the parameter that fills it; its all-reduce
           begins then, if the one before it has ended. The update waits for the last one.
    fsdp   the parameters of a block are gathered while the block before it computes, for forward and again for
           backward; its gradients are reduce-scattered after the last backward of a step, while the next one computes.

Sources: PyTorch's reducer.cpp (buckets: at least 1 MiB for the first, 25 MiB for the others, in the order in which
gradients are ready) and fully_shard (implicit prefetching of one group).
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from fastgpt.bench.network import Cluster, Collective
from fastgpt.distributed.parallelize import Parallel
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.ops.adamw import PARTIALS

BUCKETS = (1 << 20, 25 << 20)  # bytes that close the first bucket and the others
NORM = 4 * PARTIALS  # bytes of the sums of squares that FSDP2 adds up for clipping
SCALARS = (8, 12)  # bytes of a step's all-reduces besides gradients: counted tokens; loss, wishes to end and to save


class Part(NamedTuple):
    """A part of a model that runs as one: the shapes of its parameters, the last one first ready in backward, and FLOP
    per token of its forward."""

    shapes: list[torch.Size]
    flops: float


@dataclass(frozen=True)
class Work:
    """A step of one process.

    Attributes:
        parts: embeddings, blocks, and last norm with head, in the order of forward.
        itemsize: bytes of a parameter and of a gradient.
        tokens: of a micro-batch.
        micro_batches: of a step.
        rate: FLOP/s that it reaches in forward and backward.
        state: bytes that the update moves for each parameter, at `bandwidth` bytes/s.
        update: seconds of the update, if that is known.
    """

    parts: list[Part]
    itemsize: int
    tokens: int
    micro_batches: int
    rate: float
    state: int = 28  # gradient and bf16 write 2 each, and reads and writes of fp32 master and two moments
    bandwidth: float = math.inf
    update: float | None = None

    @property
    def parameters(self) -> int:
        return sum(shape.numel() for part in self.parts for shape in part.shapes)


def parts_of(config: ModelConfig, block_size: int) -> list[Part]:
    """Return the parts of a model, which is built without memory."""
    with torch.device("meta"):
        model = GPT(config)

    def shapes(*modules: nn.Module | None) -> list[torch.Size]:
        return [p.shape for m in modules if m is not None for p in reversed(list(m.parameters()))]

    def flops(found: list[torch.Size], more: float) -> float:
        return 2.0 * sum(s.numel() for s in found) + more

    attention = 4.0 * config.n_heads * config.d_head * block_size
    tied = 2.0 * model.wte.weight.numel() if config.tied else 0.0
    blocks = [Part(found, flops(found, attention)) for found in map(shapes, model.blocks)]
    head = shapes(model.head, model.norm_f)
    return [Part(shapes(model.wte, model.wpe), 0.0), *blocks, Part(head, flops(head, tied))]


def buckets(parts: list[Part], itemsize: int) -> list[tuple[int, int]]:
    """Return the buckets of DDP in the order of their all-reduces: (bytes, the part that fills it)."""
    found: list[tuple[int, int]] = []
    size, limit = 0, BUCKETS[0]
    for i in reversed(range(len(parts))):
        for shape in parts[i].shapes:
            size += shape.numel() * itemsize
            if size >= limit:
                found.append((size, i))
                size, limit = 0, BUCKETS[1]
    return [*found, (size, 0)] if size else found


def shard_bytes(shapes: list[torch.Size], itemsize: int, n: int) -> int:
    """Return the bytes that FSDP2 gathers for parameters of these shapes: their rows divided by n, rounded up."""
    return sum(n * math.ceil(s[0] / n) * s[1:].numel() * itemsize for s in shapes)


def groups(parts: list[Part]) -> list[list[torch.Size]]:
    """Return the shapes of each group of FSDP2: what is outside the blocks, then each block."""
    return [parts[0].shapes + parts[-1].shapes, *(part.shapes for part in parts[1:-1])]


def collectives(work: Work, parallel: Parallel, n: int) -> list[Collective]:
    """Return the collectives of a step of n processes, in no particular order."""
    if n == 1:
        return []
    scalars = [Collective("all_reduce", size) for size in SCALARS]
    if parallel == "ddp":
        return scalars + [Collective("all_reduce", size) for size, _ in buckets(work.parts, work.itemsize)]
    sizes = [shard_bytes(shapes, work.itemsize, n) for shapes in groups(work.parts)]
    gathers = [sizes[0], *sizes[1:], *sizes[1:]] * work.micro_batches  # the outer group stays until its backward
    norm = [Collective("all_reduce", NORM)]
    scatters = [Collective("reduce_scatter", size) for size in sizes]
    return scalars + norm + [Collective("all_gather", size) for size in gathers] + scatters


class Step(NamedTuple):
    """Seconds of a step, of its computation and of its collectives, of which `exposed` nothing hides."""

    seconds: float
    compute: float
    network: float

    @property
    def exposed(self) -> float:
        return self.seconds - self.compute


class Clock:
    """When a process has finished computing, and communicating."""

    def __init__(self, cluster: Cluster, n: int) -> None:
        self.cluster, self.n = cluster, n
        self.compute = self.network = self.computed = self.sent = 0.0

    def run(self, seconds: float, after: float = 0.0) -> float:
        """Compute as soon as what came before has ended and `after` is over; return the time of its beginning."""
        begin = max(self.compute, after)
        self.compute, self.computed = begin + seconds, self.computed + seconds
        return begin

    def call(self, call: Collective, after: float) -> float:
        """Communicate as soon as what came before has ended and `after` is over; return the time of its end."""
        seconds = self.cluster.seconds(call, self.n)
        self.network, self.sent = max(self.network, after) + seconds, self.sent + seconds
        return self.network


def _ddp(work: Work, clock: Clock, forward: list[float]) -> None:
    filled = buckets(work.parts, work.itemsize) if clock.n > 1 else []
    for micro in range(work.micro_batches):
        clock.run(sum(forward))
        for i in reversed(range(len(forward))):
            clock.run(2 * forward[i])
            if micro + 1 == work.micro_batches:
                for size, by in filled:
                    if by == i:
                        clock.call(Collective("all_reduce", size), clock.compute)


def _fsdp(work: Work, clock: Clock, forward: list[float]) -> None:
    sizes = [shard_bytes(shapes, work.itemsize, clock.n) for shapes in groups(work.parts)]
    last = len(forward) - 1
    gather = lambda i, at: clock.call(Collective("all_gather", sizes[i]), at)  # noqa: E731
    for micro in range(work.micro_batches):
        begin = clock.run(forward[0], gather(0, clock.compute))
        ready = gather(1, begin)
        for i in range(1, last):  # a block computes while the next one is gathered
            begin = clock.run(forward[i], ready)
            ready = gather(i + 1, begin) if i + 1 < last else 0.0
        clock.run(forward[last])
        begin = clock.run(2 * forward[last])
        ready = gather(last - 1, begin)
        for i in reversed(range(1, last)):
            begin = clock.run(2 * forward[i], ready)
            ready = gather(i - 1, begin) if i > 1 else 0.0
            if micro + 1 == work.micro_batches:
                clock.call(Collective("reduce_scatter", sizes[i]), clock.compute)
        clock.run(2 * forward[0])
        if micro + 1 == work.micro_batches:
            clock.call(Collective("reduce_scatter", sizes[0]), clock.compute)


def simulate(work: Work, cluster: Cluster, parallel: Parallel, n: int, slow: float = 1.0) -> Step:
    """Return a step of n processes, of which the slowest computes for `slow` times as long as usual."""
    clock = Clock(cluster, n)
    forward = [slow * part.flops * work.tokens / work.rate for part in work.parts]
    clock.call(Collective("all_reduce", SCALARS[0]), 0.0)
    clock.run(0.0, clock.network)
    sharded = parallel == "fsdp" and n > 1
    (_fsdp if sharded else _ddp)(work, clock, forward)
    clock.call(Collective("all_reduce", SCALARS[1]), clock.compute)
    if sharded:
        clock.call(Collective("all_reduce", NORM), clock.network)
    moved = work.parameters * work.state / (n if sharded else 1)
    clock.run(moved / work.bandwidth if work.update is None else work.update, clock.network)
    return Step(clock.compute, clock.computed, clock.sent)


@functools.cache
def slowest(n: int, jitter: float, draws: int = 100) -> float:
    """Return the mean of the longest of n computing times, which are log-normal with mean 1; all wait for that one."""
    draw, mean = random.Random(0), -(jitter**2) / 2
    return sum(max(draw.lognormvariate(mean, jitter) for _ in range(n)) for _ in range(draws)) / draws
