"""Record the kernels of a function of tensors in a CUDA graph, and replay them with one launch.

The host time of a replay does not depend on the number of kernels. Inputs and results have fixed addresses: the caller
copies inputs in and reads results before the next replay. A recorded function must not wait for the device or use host
numbers that change. Source: PyTorch's notes on CUDA graphs, pytorch.org/docs/stable/notes/cuda.html.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

WARM_STEPS = 3  # calls before a capture, in which cuBLAS, Triton and the allocator warm up; PyTorch asks for three

Result = TypeVar("Result")


class CaptureLost(RuntimeError):
    """Raised when CUDA aborts a capture. The allocator and the random generator of some versions of PyTorch (such as
    2.11) then treat the capture as active forever, so this process cannot continue."""


def record(function: Callable[..., Result], inputs: list[Any], pool: Any) -> tuple[Callable[[], None], Result, Any]:
    """Record function(*inputs) on the current stream without running it; return (replay, its result, the memory pool).

    Raises:
        CaptureLost: `function` called something that a capture does not allow, such as waiting for the device.
        Exception: raised by `function`; the capture itself is intact.
    """
    graph, raised = torch.cuda.CUDAGraph(), None
    try:
        # thread_local: the threads of the loader and the checkpoint writer may allocate pinned memory meanwhile
        with torch.cuda.graph(graph, pool, torch.cuda.current_stream(), capture_error_mode="thread_local"):
            try:
                out = function(*inputs)
            except Exception as e:
                raised = e
                raise
    except Exception as e:
        if e is raised:
            raise
        raise CaptureLost(sentence(raised or e)) from e  # e only says that an earlier error occurred
    return graph.replay, out, graph.pool()


def sentence(e: BaseException) -> str:
    """Return the message of an error, or of the first error in its chain, on one line."""
    while inner := e.__cause__ or (None if e.__suppress_context__ else e.__context__):
        e = inner
    return " ".join(str(e).split())[:300] or type(e).__name__
