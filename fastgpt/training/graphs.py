"""A training step from CUDA graphs: what it launches is recorded once, then replayed by one call.

Micro-step and optimizer step are functions of tensors. The first steps call them (cuBLAS, Triton and allocations
settle); then each is recorded with inputs, gradients and results at fixed addresses, and from there on its inputs are
copied in and the graph is launched. The host's share of a step no longer depends on the number of kernels, which bounds
small batches. A recorded function must not wait for the device, nor use numbers of the host that change (learning rates
lie on the device). Source: PyTorch's notes on CUDA graphs, pytorch.org/docs/stable/notes/cuda.html.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.core.errors import UserError
from fastgpt.optim import AdamW
from fastgpt.training.config import TrainConfig

WARM_STEPS = 3  # PyTorch asks for three before a capture

Function = Callable[..., Tensor]


class CaptureLost(RuntimeError):
    """CUDA ended a capture with an error. The allocator and the random generator of some versions of PyTorch (2.11 is
    one) then believe for good that they are inside it, so that this process cannot go on."""


def record(function: Function, inputs: list[Tensor], pool: Any) -> tuple[Callable[[], None], Tensor, Any]:
    """Record function(*inputs) on the current stream, without running it: (replay, its result, the memory pool).

    Raises:
        CaptureLost: what was called is not allowed in a capture, as waiting for the device is.
        Exception: of `function`, which left the capture intact.
    """
    graph, raised = torch.cuda.CUDAGraph(), None
    try:
        # thread_local: the loader's and the checkpoint writer's threads may allocate pinned memory meanwhile
        with torch.cuda.graph(graph, pool, torch.cuda.current_stream(), capture_error_mode="thread_local"):
            try:
                out = function(*inputs)
            except Exception as e:
                raised = e
                raise
    except Exception as e:
        if e is raised:
            raise
        raise CaptureLost(_sentence(raised or e)) from e  # e says only that there was an error before
    return graph.replay, out, graph.pool()


def _sentence(e: BaseException) -> str:
    """An error's own words, or those of the one that it came from, in one line."""
    while inner := e.__cause__ or (None if e.__suppress_context__ else e.__context__):
        e = inner
    return " ".join(str(e).split())[:300] or type(e).__name__


class Graphs:
    """Calls the parts of a step by name; once they are recorded, replays them. Not enabled: only calls them.

    All graphs share one memory pool: their parts are called in one order, step after step. Where a part cannot be
    recorded, `failure` says why, gradients are as before it, and every part is called as without graphs from then on;
    where CUDA itself ended the capture, that is a UserError.
    """

    def __init__(self, model: nn.Module, enabled: bool = True) -> None:
        self.parameters = list(model.parameters())
        self.enabled = enabled
        self.steps = 0  # begun
        self.recorded: dict[str, tuple[list[Tensor], Callable[[], None], Tensor]] = {}
        self.pool: Any = None
        self.failure = ""

    @classmethod
    def of_run(cls, cfg: TrainConfig, model: nn.Module, device: torch.device) -> Graphs:
        """As the settings say; makes a new stream current, since the default one cannot be captured."""
        enabled = cfg.graphs and device.type == "cuda" and cfg.optimizer == "adamw"  # Muon waits for the device
        if enabled:
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            torch.cuda.set_stream(stream)
        return cls(model, enabled)

    def begin(self, optimizer: Any) -> None:
        """Call it before each step. All parts are recorded in the same one, so that they share its gradients."""
        self.steps += 1
        if self.enabled:
            assert isinstance(optimizer, AdamW)
            optimizer.refresh_lr()  # copies the rates to the device, where a replayed step reads them

    def note(self) -> str:
        """Why a step could not be recorded, the first time that this is asked after it; else empty."""
        if not self.enabled or not self.failure:
            return ""
        self.enabled = False
        return f"graphs: a step could not be recorded, so its kernels are launched one by one ({self.failure})"

    def __call__(self, name: str, function: Function, *inputs: Tensor) -> Tensor:
        """function(*inputs); the result is good until the next step begins."""
        if not self.enabled or self.failure or self.steps <= WARM_STEPS:
            return function(*inputs)
        if name not in self.recorded:
            grads = [p.grad for p in self.parameters]
            try:
                static = [x.clone() for x in inputs]
                replay, out, self.pool = record(function, static, self.pool)
            except CaptureLost as e:
                raise UserError(
                    f"graphs: {name} cannot be recorded ({e}), and CUDA does not recover from that: run again with "
                    "--no-graphs"
                ) from e
            except Exception as e:
                self.failure = f"{name}: {_sentence(e)}"
                for p, grad in zip(self.parameters, grads, strict=True):
                    p.grad = grad
                return function(*inputs)
            self.recorded[name] = static, replay, out
        static, replay, out = self.recorded[name]
        for place, x in zip(static, inputs, strict=True):
            place.copy_(x)
        replay()
        return out
