"""A model of collectives: bytes that a process sends, and seconds, as NCCL's tuner estimates them.

    ring   base + (k - b) h_in + b h_out + (k / n) S / B     k = 2 (n - 1) steps of an all-reduce, n - 1 of the others
    tree   base + 2 ((g - 1) t_in + log2(m) t_out) + 2 S / (0.9 B)    all-reduce only; the faster of both is used

for S bytes, n processes on m machines of g each, b of the k steps between machines, bandwidth B of a ring in bytes/s.
A process sends (k / n) S bytes.

Sources: src/graph/tuning.cc of NCCL, for its protocol Simple; Patarasuk and Yuan, Bandwidth Optimal All-reduce
Algorithms for Clusters of Workstations, 2009.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fastgpt.core.cards import CARDS

Kind = Literal["all_reduce", "all_gather", "reduce_scatter"]


class Collective(NamedTuple):
    """One call: `size` is the bytes of the tensor that an all-reduce sums, an all-gather returns or a reduce-scatter
    takes."""

    kind: Kind
    size: int

    def steps(self, n: int) -> int:
        """Return the steps of a ring of n processes."""
        return (2 if self.kind == "all_reduce" else 1) * (n - 1)

    def sent(self, n: int) -> float:
        """Return the bytes that each of n processes sends."""
        return self.steps(n) / n * self.size


@dataclass(frozen=True)
class Cluster:
    """Machines of `per_node` GPUs. Bandwidths are those of a ring, in bytes/s; latencies in seconds.

    Attributes:
        peak: dense bf16 FLOP/s of a GPU.
        memory: bandwidth of a GPU's memory.
        inside: bandwidth within a machine.
        between: bandwidth between machines, of all network cards of one together.
        base: latency of a call.
        hop: latencies of a step within a machine and between two.
        tree: the same of a tree's step; None: there are only rings.
    """

    name: str
    peak: float
    memory: float
    per_node: int
    inside: float
    between: float
    base: float = 8.4e-6
    hop: tuple[float, float] = (3.4e-6, 9.6e-6)
    tree: tuple[float, float] | None = (28e-6, 50e-6)

    def seconds(self, call: Collective, n: int) -> float:
        """Return the seconds of a call of n processes."""
        if n == 1:
            return 0.0
        nodes = math.ceil(n / self.per_node)
        k, times = call.steps(n), 2 if call.kind == "all_reduce" else 1
        bandwidth = self.inside if nodes == 1 else min(self.inside, self.between)
        outside = times * (nodes - 1)
        ring = self.base + (k - outside) * self.hop[0] + outside * self.hop[1] + call.sent(n) / bandwidth
        if self.tree is None or call.kind != "all_reduce":
            return ring
        depth = (min(n, self.per_node) - 1) * self.tree[0] + math.log2(nodes) * self.tree[1]
        return min(ring, self.base + 2 * depth + 2 * call.size / (0.9 * bandwidth))


# name -> cluster, and where its numbers are from; latencies are those of tuning.cc
A100, H100 = CARDS["A100 80GB"], CARDS["H100 80GB"]
CLUSTERS = {
    "a100": Cluster("A100 80GB", A100.peak, A100.bandwidth, 8, inside=235e9, between=0.9 * 8 * 25e9),
    "h100": Cluster("H100 80GB", H100.peak, H100.bandwidth, 8, inside=0.8 * 450e9, between=0.9 * 8 * 50e9),
}
SOURCES = {
    "a100": "235 GB/s within a machine: the limit in NCCL's tuning.cc; between machines 8 cards of 200 Gbit/s "
    "(datasheet of the DGX A100), of which 90 % are used (assumed)",
    "h100": "NVLink of 450 GB/s a direction (datasheet of the H100), of which 80 % are used (assumed); between "
    "machines 8 cards of 400 Gbit/s (datasheet of the DGX H100), of which 90 % are used (assumed)",
}
