"""Tensors of the meta device that pass for CUDA tensors, for launchers of other libraries.

Such a launcher asks for the device of a tensor, sizes its grid by that device's multiprocessors, and allocates there.
Within `as_cuda` the answer is the CUDA device, and what is made on it has no memory either.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastgpt.bench.model.recording import META, replaced

CUDA = torch.device("cuda", 0)


class _Passing(TorchFunctionMode):
    """Says that tensors are on the CUDA device, and makes new ones on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return CUDA
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if func is torch.equal:  # Liger asks whether the gradient of its loss is one, which it is here
            return True
        if kwargs.get("device") is not None:
            kwargs["device"] = META
        return func(*(META if isinstance(a, torch.device) else a for a in args), **kwargs)


@contextlib.contextmanager
def as_cuda() -> Iterator[None]:
    """Let code see tensors of the meta device as CUDA tensors, within `as_if_on`, which says what GPU that is."""
    engine = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def backward(*args: Any, **kwargs: Any) -> Any:
        with _Passing():  # torch.autograd.grad has left the one below
            return engine(*args, **kwargs)

    cuda: dict[str, Any] = dict(is_available=lambda: True, device=lambda device: contextlib.nullcontext())
    _forget()
    try:
        with replaced(torch.cuda, **cuda), replaced(torch.autograd, _engine_run_backward=backward), _Passing():
            yield
    finally:
        _forget()


def _forget() -> None:
    """Clear what Liger keeps of the device that it found first."""
    utils = sys.modules.get("liger_kernel.utils")
    if utils is not None and hasattr(utils, "infer_device_arch"):
        utils.infer_device_arch.cache_clear()
