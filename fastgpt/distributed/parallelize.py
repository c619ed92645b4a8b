"""A model spread over processes by PyTorch's DDP or FSDP2, behind the interface of a task.

The gradients of a step are the sums over all processes, because the loss of each micro-batch is divided by the tokens
of the whole step. They are reduced once in a step, with its last micro-batch.

    ddp    every process holds the whole model; gradients are all-reduced in buckets while backward runs
    fsdp   every process holds a shard of each parameter, its gradient and its optimizer state; the parameters of a
           block are gathered for its forward and again for its backward

Source: PyTorch's DistributedDataParallel and fully_shard.
"""

# no `from __future__ import annotations`: DDP compares the annotations of its hook with types
import inspect
import warnings
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastgpt.data.batch import Batch
from fastgpt.distributed.mesh import Mesh
from fastgpt.models.gpt import GPT

Parallel = Literal["ddp", "fsdp"]


class Losses(nn.Module):
    """The losses of a task as a module, which DDP and FSDP2 put their hooks on."""

    def __init__(self, model: nn.Module, task: Any) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, *batch: Any) -> Tensor:
        loss: Tensor = self.task.loss(self.model, Batch(*batch))
        return loss


class Spread:
    """A task whose model is spread over the processes of a mesh; everything else is the task's.

    Args:
        task: what the run trains for.
        model: of the run, on this process's device; "fsdp" replaces its parameters by DTensors.
        mesh: of more than one process, connected.
        parallel: how the model is spread.
        reduce_dtype: of the sums of gradients over processes; None: the dtype of the gradients.
        compiled: the model as torch.compile returned it, if the run compiles.
    """

    def __init__(
        self,
        task: Any,
        model: GPT,
        mesh: Mesh,
        parallel: Parallel,
        reduce_dtype: torch.dtype | None = None,
        compiled: nn.Module | None = None,
    ) -> None:
        self.task, self.mesh, self.parallel = task, mesh, parallel
        losses = Losses(model if compiled is None else compiled, task)
        self.module: Any = losses
        self.ordered = parallel != "ddp"
        if parallel == "ddp":
            known = inspect.signature(DistributedDataParallel).parameters
            copies = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before 2.13
            options: dict[str, Any] = {copies: False, "gradient_as_bucket_view": True, "process_group": mesh.group}
            self.module = DistributedDataParallel(losses, **options)
            self.module.register_comm_hook((mesh.group, reduce_dtype), sum_bucket)
        else:
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # half a second

            policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
            within = None
            if mesh.group is not None:
                from torch.distributed.device_mesh import DeviceMesh

                within = DeviceMesh.from_group(mesh.group, next(model.parameters()).device.type)
            for part in [*model.blocks, losses]:
                fully_shard(part, mp_policy=policy, mesh=within)
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)  # else a factor needs an operation that gloo lacks
            # nothing is written to the output of a block in place
            warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(.*\) returned a view tensor")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Return the sums of this process's batch, as the task does."""
        if not self.ordered and torch.is_grad_enabled():
            self._order(batch)
        loss: Tensor = self.module(*batch.parts())
        return loss

    def _order(self, batch: Batch) -> None:
        """Compute gradients that do not count. DDP orders its buckets by the first ones, and a resumed run must sum in
        the order of one that was not stopped."""
        self.ordered = True
        last, self.module.require_backward_grad_sync = self.module.require_backward_grad_sync, True
        with torch.random.fork_rng([batch.ids.device] if batch.ids.is_cuda else []):
            self.module(*batch.parts()).sum().backward()
        self.module.zero_grad(set_to_none=True)
        self.module.require_backward_grad_sync = last

    def reshard(self) -> None:
        """Let the parameters of the model be shards again, which those outside the blocks are not after a forward
        without a backward. Call it before what reads parameters."""
        if self.parallel == "fsdp":
            self.module.reshard()

    def reduces(self, last: bool) -> None:
        """Say whether the next backward is the last of a step, in which gradients are reduced."""
        if self.parallel == "ddp":
            self.module.require_backward_grad_sync = last
        else:
            self.module.set_requires_gradient_sync(last)


def sum_bucket(state: tuple[Any, torch.dtype | None], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sum a bucket of gradients over the processes of a group, in a dtype (None: its own): a hook of DDP."""
    own, (group, dtype) = bucket.buffer(), state
    wide = own if dtype is None else own.to(dtype)  # itself if it has that dtype
    work: Any = dist.all_reduce(wide, group=group, async_op=True)

    def narrow(found: torch.futures.Future[list[Tensor]]) -> Tensor:
        total = found.value()[0]
        return total if total.dtype == own.dtype else own.copy_(total)

    future: torch.futures.Future[Tensor] = work.get_future().then(narrow)
    return future
