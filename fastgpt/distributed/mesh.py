"""The processes of a run, as torchrun starts them, and what they say to one another.

A run without torchrun is a mesh of one process, whose sums are what they are given. NCCL carries tensors between GPUs,
gloo between CPUs.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastgpt.core.errors import UserError

TIMEOUT = timedelta(minutes=10)  # a process that waits longer for the others gives up
# parts of the errors of operations that another process does not take part in any more
LOST = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL")
FAILED, SAID = "fastgpt/failed", "fastgpt/said"  # in the store of the processes: which error ends them, and who said so


@dataclass(frozen=True)
class Mesh:
    """The processes of a run.

    Attributes:
        rank: number of this process, from 0 on.
        world: number of processes.
        local: number of this process on its machine, which is that of its GPU.
        group: process group of these processes; None is that of all.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    group: Any = None

    @property
    def main(self) -> bool:
        """Whether this process writes logs and the files of a run."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """Return the device of this process: of several GPUs the one with its number."""
        several = self.world > 1 and device.type == "cuda" and device.index is None
        return torch.device("cuda", self.local) if several else device

    def sum(self, t: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place, without waiting for the device; return it."""
        if self.world > 1:
            dist.all_reduce(t, group=self.group)
        return t

    def share(self, value: Any) -> Any:
        """Return the value that the main process passes: any plain object."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the value of each process, in the order of the ranks: any plain object."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.group)
        return found


ALONE = Mesh()


def find_mesh() -> Mesh:
    """Return the mesh that torchrun describes in the environment, not connected yet; without it, that of one process.

    Raises:
        UserError: a part of the description is missing.
    """
    if "WORLD_SIZE" not in os.environ:
        return ALONE
    try:
        return Mesh(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))
    except (KeyError, ValueError):
        raise UserError(
            "WORLD_SIZE is set, but RANK, WORLD_SIZE and LOCAL_RANK are not all numbers, expected torchrun"
        ) from None


@contextlib.contextmanager
def connected(mesh: Mesh, device: torch.device) -> Iterator[None]:
    """Connect the processes inside this context. An error in one of them ends all, and one of them says why.

    Raises:
        UserError: of this process, or because another process has ended; only in the first process that raises one.
        SystemExit: another process has raised an error that says why.
    """
    if mesh.world == 1:
        yield
        return
    cuda = device.type == "cuda"
    store = _store()
    backend, own = ("nccl", device) if cuda else ("gloo", None)
    dist.init_process_group(backend, store=store, rank=mesh.rank, world_size=mesh.world, timeout=TIMEOUT, device_id=own)
    try:
        yield
        dist.barrier()  # a process that ends earlier would close connections that others still use
    except Exception as e:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it to the others, which shall have their say
        _end(mesh, store, e)
        raise
    finally:
        dist.destroy_process_group()


def _store() -> dist.Store:
    """Return the store in which processes find one another.

    torchrun keeps it over restarts, with the addresses of processes that have ended; what a process finds there is
    of its own attempt. Several machines do not number attempts alike.
    """
    store = next(dist.rendezvous("env://", timeout=TIMEOUT))[0]
    store.set_timeout(TIMEOUT)
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "", store)


def _end(mesh: Mesh, store: dist.Store, e: Exception) -> None:
    """Raise what ends this process in place of `e`; return if that is `e` itself."""
    lost = isinstance(e, RuntimeError) and any(sign in str(e) for sign in LOST)
    if not lost and not isinstance(e, (UserError, OSError)):  # this process shows a traceback, another one a sentence
        with contextlib.suppress(RuntimeError):
            store.set(FAILED, f"process {mesh.rank} failed with {type(e).__name__}: {e}")
        return
    try:
        why = store.get(FAILED).decode() if store.check([FAILED]) else "another process has ended without an error"
        first = store.add(SAID, 1) == 1
    except RuntimeError:  # without torchrun, the store ends with the main process
        why, first = "another process has ended; its message says why", True
    if not first:
        raise SystemExit(1) from None
    if lost:
        raise UserError(f"process {mesh.rank} stops: {why}") from e
