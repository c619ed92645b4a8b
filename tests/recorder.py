"""A recorder of PyTorch's calls under the rules of CUDA graphs: fixed addresses, host numbers frozen, no waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgpt.core.graphs import CaptureLost

WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)


class Recorder(TorchDispatchMode):
    """Runs each call and keeps it with the tensors it read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITS:
            raise CaptureLost(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for place, value in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


def recording(state: Callable[[], list[Tensor]]) -> Callable[..., Any]:
    """Return a replacement of core.graphs.record on a CPU: since a capture runs nothing, `state` and the random
    generator are restored."""

    def record(
        function: Callable[..., Any], inputs: list[Tensor], pool: object
    ) -> tuple[Callable[[], None], Any, None]:
        with torch.no_grad():
            before = [(t, t.clone()) for t in [*state(), *inputs] if t is not None]
        random = torch.get_rng_state()
        try:
            with Recorder() as recorder:
                out = function(*inputs)
        finally:
            with torch.no_grad():
                for t, value in before:
                    t.copy_(value)
            torch.set_rng_state(random)
        return recorder.replay, out, None

    return record
