"""Run training steps from CUDA graphs: record the kernels of a step once, then replay them with one call.

The micro-step and the optimizer step are functions of tensors. The first steps call them, so cuBLAS, Triton and the
allocator warm up. Then each function is recorded with inputs, gradients and results at fixed addresses; from then on,
its inputs are copied in and the graph is launched. The host time of a step, which limits small batches, no longer
depends on the number of kernels. A recorded function must not wait for the device or use host numbers that change
(learning rates live on the device). Source: PyTorch's notes on CUDA graphs,
pytorch.org/docs/stable/notes/cuda.html.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.core.errors import UserError
from fastgpt.core.graphs import WARM_STEPS, CaptureLost, record, sentence
from fastgpt.distributed.mesh import ALONE, Mesh
from fastgpt.optim import AdamW
from fastgpt.training.config import TrainConfig

Function = Callable[..., Tensor]


class Graphs:
    """Caller of a step's parts by name, which replays them once they are recorded; if not enabled, it only calls them.

    All graphs share one memory pool, because their parts run in the same order in every step. If a part cannot be
    recorded, `failure` holds the reason, gradients are restored, and every part is called without graphs from then on.
    If CUDA itself aborted the capture, UserError is raised.
    """

    def __init__(self, model: nn.Module, enabled: bool = True) -> None:
        self.parameters = list(model.parameters())
        self.enabled = enabled
        self.steps = 0  # steps begun
        self.recorded: dict[str, tuple[list[Tensor | None], Callable[[], None], Tensor]] = {}
        self.pool: Any = None
        self.failure = ""

    @classmethod
    def of_run(cls, cfg: TrainConfig, model: nn.Module, device: torch.device, mesh: Mesh = ALONE) -> Graphs:
        """Create the graphs of a run; if enabled, make a new stream current, as the default one cannot be captured."""
        enabled = cfg.graphs and device.type == "cuda" and cfg.optimizer == "adamw"  # Muon was never recorded on a GPU
        enabled = enabled and mesh.world == 1  # hooks that reduce gradients run on the host
        if enabled:
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            torch.cuda.set_stream(stream)
        return cls(model, enabled)

    def begin(self, optimizer: Any) -> None:
        """Begin a step; call it before each one. All parts are recorded in one step, so they share its gradients."""
        self.steps += 1
        if self.enabled:
            assert isinstance(optimizer, AdamW)
            optimizer.refresh_lr()  # copies the rates to the device, where a replayed step reads them

    def note(self) -> str:
        """Return, at the first call after a failure, why a step could not be recorded; else an empty string."""
        if not self.enabled or not self.failure:
            return ""
        self.enabled = False
        return f"graphs: a step could not be recorded, so its kernels are launched one by one ({self.failure})"

    def __call__(self, name: str, function: Function, *inputs: Any) -> Tensor:
        """Return function(*inputs), called or replayed; the result is valid until the next step begins. A recorded
        function takes tensors, and None where it is None in every step."""
        if not self.enabled or self.failure or self.steps <= WARM_STEPS:
            return function(*inputs)
        if name not in self.recorded:
            grads = [p.grad for p in self.parameters]
            try:
                made = {id(out) for _, _, out in self.recorded.values()}
                static = [x if x is None or id(x) in made else x.clone() for x in inputs]
                replay, out, self.pool = record(function, static, self.pool)
            except CaptureLost as e:
                raise UserError(
                    f"graphs: {name} cannot be recorded ({e}), and CUDA does not recover from that: run again with "
                    "--no-graphs"
                ) from e
            except Exception as e:
                self.failure = f"{name}: {sentence(e)}"
                for p, grad in zip(self.parameters, grads, strict=True):
                    p.grad = grad
                return function(*inputs)
            self.recorded[name] = static, replay, out
        static, replay, out = self.recorded[name]
        for place, x in zip(static, inputs, strict=True):
            if place is not None and place is not x:  # else it is where another part, recorded before, left its result
                place.copy_(x)
        replay()
        return out
