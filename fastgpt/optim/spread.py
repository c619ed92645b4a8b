"""Orthogonalise the matrices of several processes, each matrix in one of them, with the work spread by size.

    copies   every process has all matrices (DDP): it orthogonalises its own, and all gather the results
    shards   every process has some rows of each (FSDP2): they go to the owner of their matrix, and its result returns,
             in one all-to-all each way

Matrices travel in the precision of the iteration. The host knows all sizes, so nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastgpt.optim.newton_schulz import orthogonalise
from fastgpt.optim.state import is_sharded, local, sum_over

Shapes = Sequence[tuple[int, ...]]


def total_norm(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the norm over all gradients of (parameter, gradient) pairs, those of other processes too, as (1,) fp32."""
    shards: dict[tuple[Any, ...], list[Tensor]] = {}
    for p, g in pairs:
        groups, g = groups_of(p), gradient(p, g)
        shards.setdefault(groups, []).append(g.float() if g.dtype == torch.float64 else g)
    norms = {groups: torch.stack(torch._foreach_norm(gs, 2, dtype=torch.float32)) for groups, gs in shards.items()}
    squares = [sum_over(groups, each.square().sum().reshape(1)) for groups, each in norms.items()]
    return torch.stack(squares).sum(0).sqrt()


def groups_of(p: Any) -> tuple[Any, ...]:
    """Return the process groups that a DTensor is sharded over; none for another tensor."""
    if not is_sharded(p):
        return ()
    return tuple(p.device_mesh.get_group(i) for i, place in enumerate(p.placements) if place.is_shard())


def gradient(p: Any, g: Any) -> Tensor:
    """Return this process's part of the gradient of p, in the rows that it has of p."""
    if is_sharded(p) and g.placements != p.placements:
        g = g.redistribute(placements=p.placements)
    return local(g)


def group_of_rows(p: Any) -> Any:
    """Return the process group over which the rows of a DTensor are shared out.

    Raises:
        ValueError: it is placed otherwise.
    """
    if len(p.placements) != 1 or not p.placements[0].is_shard(0):
        raise ValueError(
            f"MuonAdamW: a matrix is placed as {p.placements}, expected rows sharded over one mesh dimension"
        )
    return p.device_mesh.get_group(0)


def owners(shapes: Shapes, world: int) -> list[list[int]]:
    """Return the positions of the matrices of each process: the largest first, to the process with the least work."""
    work = [0] * world
    found: list[list[int]] = [[] for _ in range(world)]
    cost = [max(shape) * min(shape) ** 2 for shape in shapes]
    for i in sorted(range(len(shapes)), key=lambda i: (-cost[i], i)):
        least = min(range(world), key=lambda r: (work[r], r))
        work[least] += cost[i]
        found[least].append(i)
    return found


def orthogonalise_copies(matrices: Sequence[Tensor], precision: torch.dtype) -> list[Tensor]:
    """Orthogonalise matrices (R, C) that every process of the default group has."""
    rank, world = dist.get_rank(), dist.get_world_size()
    order = owners([m.shape for m in matrices], world)
    sizes = [[matrices[i].numel() for i in mine] for mine in order]
    longest = max(map(sum, sizes))
    own = matrices[0].new_zeros(longest, dtype=precision)  # the same length for all
    done = orthogonalise([matrices[i] for i in order[rank]], precision)
    for place, out in zip(own.split([*sizes[rank], longest - sum(sizes[rank])]), done):
        place.view(out.shape).copy_(out)
    every = own.new_empty(world * longest)
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.13
    gather(every, own)
    found = list(matrices)
    for mine, size, row in zip(order, sizes, every.view(world, longest)):
        for i, flat in zip(mine, row.split([*size, longest - sum(size)])):
            found[i] = flat.view(matrices[i].shape)
    return found


def orthogonalise_shards(shards: Sequence[Tensor], shapes: Shapes, precision: torch.dtype, group: Any) -> list[Tensor]:
    """Orthogonalise matrices of these shapes (R, C), of which this process has the rows `shards`; return its rows."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    order = owners(shapes, world)
    mine = order[rank]

    def rows(i: int, process: int) -> int:
        """Return how many rows of matrix i a process has: torch.chunk's."""
        each = -(-shapes[i][0] // world)
        return len(range(shapes[i][0])[process * each : (process + 1) * each])

    sizes = [[shards[i].numel() for i in own] for own in order]  # elements that this process has, by owner
    coming = [[rows(i, r) * shapes[i][1] for i in mine] for r in range(world)]  # of its own matrices, by process
    send, receive = list(map(sum, sizes)), list(map(sum, coming))
    sent = torch.cat([shards[i].to(precision).flatten() for own in order for i in own])
    got = sent.new_empty(sum(receive))
    dist.all_to_all_single(got, sent, receive, send, group=group)
    parts = [part.split(size) for part, size in zip(got.split(receive), coming)]
    whole = [torch.cat([part[k] for part in parts]).view(shapes[i]) for k, i in enumerate(mine)]
    done = [m.split([rows(i, r) for r in range(world)]) for i, m in zip(mine, orthogonalise(whole, precision))]
    back = torch.cat([got[:0], *(m[r].flatten() for r in range(world) for m in done)])
    dist.all_to_all_single(sent, back, send, receive, group=group)
    found = list(shards)
    for own, size, part in zip(order, sizes, sent.split(send)):
        for i, flat in zip(own, part.split(size)):
            found[i] = flat.view(shards[i].shape)
    return found
