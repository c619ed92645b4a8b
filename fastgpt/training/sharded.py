"""Sharded checkpoints: each process writes the pieces of tensors that FSDP2 gave it, and reads those that it needs.

torch.distributed.checkpoint plans which process writes or reads which piece, for any number of processes, and makes a
failure in one of them known to all. Files are tensor files with the positions of their pieces
(fastgpt.core.tensorpieces), so nothing is unpickled. The main process completes the checkpoint when all have written.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from fastgpt.core.errors import UserError, cause_of
from fastgpt.core.tensorfile import DTYPES
from fastgpt.core.tensorpieces import Pieces, metadata_of
from fastgpt.distributed.mesh import TIMEOUT, Mesh
from fastgpt.optim.state import is_sharded
from fastgpt.training.checkpoint import MODEL, OPTIMIZER, Draft, Writer, shard_name


class ShardedWriter(Writer):
    """Writer of sharded checkpoints. Every process calls `save`, with its own part of the tensors.

    The threads of the processes talk in a group of their own, so their messages do not mix with those of training.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.mesh, self.group = mesh, dist.new_group(backend="gloo", timeout=TIMEOUT)

    def copied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return copies in host memory; those of DTensors are DTensors."""
        stager = DefaultStager(StagingOptions(False, False, False, False))  # copies before it returns
        copies: Any = stager.stage(tensors)
        stager.close()
        return dict(copies)

    def write(
        self,
        run: Path,
        step: int,
        weights: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        state: dict[str, Any],
        keep: int,
        stays: Container[int] = (),
    ) -> Path:
        """Write this process's part of a checkpoint, and return when all have written theirs.

        Raises:
            UserError: a process cannot write; earlier checkpoints are not changed.
        """
        draft = Draft(run, step)
        storage = _Storage(draft, self.mesh, weights, (state, keep, stays))
        try:
            dcp.save({**weights, **optimizer}, storage_writer=storage, process_group=self.group)
        except CheckpointException as e:
            rank, cause = _first(e)
            if not isinstance(cause, OSError):
                raise RuntimeError(f"process {rank} could not write a checkpoint") from cause
            raise draft.failed(f"process {rank}: {cause_of(cause)}") from e
        return draft.final


class _Storage(StorageWriter):
    """The files of a checkpoint, as torch.distributed.checkpoint writes to them."""

    def __init__(self, draft: Draft, mesh: Mesh, weights: Collection[str], end: tuple[Any, ...]) -> None:
        self.draft, self.mesh, self.weights, self.end = draft, mesh, weights, end

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the folder: in the main process, before any process writes."""
        self.draft.begin()
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's pieces of the weights, and those of the optimizer's state."""
        written = []
        for name in (MODEL, OPTIMIZER):
            items = [item for item in plan.items if (item.index.fqn in self.weights) == (name == MODEL)]
            if items:
                pieces: dict[str, Any] = {item.index.fqn: planner.resolve_data(item) for item in items}
                offsets = {item.index.fqn: item.index.offset or () for item in items}
                file = shard_name(name, self.mesh)
                about = self.draft.write(file, pieces, metadata_of(offsets))
                written.append(WriteResult(items[0].index, about["bytes"], (file, about)))
        future: Future[list[WriteResult]] = Future()
        future.set_result(written)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Complete the checkpoint: in the main process, after all have written."""
        self.draft.complete(dict(result.storage_data for each in results for result in each), *self.end)

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def load(found: Mapping[str, Pieces], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return this process's part of each tensor of a checkpoint. Every process calls it.

    Args:
        found: the tensors, from a checkpoint of whole tensors or of shards of any number of processes.
        like: by name the DTensors after which tensors of their shape are spread; others are whole in every process.

    Returns:
        Tensors of the dtypes in the checkpoint: torch.distributed.checkpoint would cast to others without a word.

    Raises:
        UserError: a file cannot be read.
    """
    tensors: dict[str, Any] = {name: _empty(pieces, like.get(name)) for name, pieces in found.items()}
    try:
        dcp.load(tensors, storage_reader=_Reader(found))
    except CheckpointException as e:
        raise _first(e)[1] from None
    return tensors


def _empty(pieces: Pieces, like: Tensor | None) -> Tensor:
    dtype = DTYPES[pieces.dtype]
    if like is not None and is_sharded(like) and tuple(like.shape) == pieces.shape:
        return torch.empty_like(like, dtype=dtype)
    return torch.empty(pieces.shape, dtype=dtype)


class _Reader(StorageReader):
    """The tensors of a checkpoint, as torch.distributed.checkpoint reads them."""

    def __init__(self, found: Mapping[str, Pieces]) -> None:
        self.found = found

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Describe the tensors and their pieces."""
        described: dict[str, Any] = {}
        for name, pieces in self.found.items():
            chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(entry.shape)) for o, entry in pieces.parts]
            properties = TensorProperties(dtype=DTYPES[pieces.dtype])
            described[name] = TensorStorageMetadata(properties, torch.Size(pieces.shape), chunks)
        return Metadata(described)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what the plan asks for, one piece in host memory at a time."""
        for item in plan.items:
            entry = dict(self.found[item.storage_index.fqn].parts)[tuple(item.storage_index.offset or ())]
            part = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
            target = planner.resolve_tensor(item).detach()
            target.copy_(entry.read()[part])
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _first(e: CheckpointException) -> tuple[int, BaseException]:
    """Return the first process that failed, and its error."""
    rank, (cause, _) = min(e.failures.items(), key=lambda failure: failure[0])
    return rank, cause


def require_fit(path: Path, found: Mapping[str, Pieces], own: Mapping[str, Tensor]) -> None:
    """Refuse weights of checkpoint `path` whose names, shapes or dtypes are not those of the model.

    Raises:
        UserError: names the first tensor that is missing, unknown, or of another shape or dtype.
    """
    for name in sorted(own.keys() ^ found.keys()):
        what = "a tensor that the model does not have" if name in found else "no tensor that the model has"
        raise UserError(f"checkpoint {path} has {what}: {name}")
    for name, there in found.items():
        t, dtype = own[name], DTYPES[there.dtype]
        if there.shape != tuple(t.shape):
            raise UserError(f"checkpoint {path} has {name} of shape {there.shape}, expected {tuple(t.shape)}")
        if dtype != t.dtype:
            raise UserError(f"checkpoint {path} has {name} in {dtype}, expected {t.dtype}, the dtype of this run")
