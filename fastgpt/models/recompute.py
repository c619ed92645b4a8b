"""Activations made again in backward instead of kept: what is saved per block, in exchange for a little time.

none    everything that backward needs is kept
norms   outputs of norms and of the MLP's activation, which only the next product needs, are made again from their
        inputs, which are kept anyway: the same kernels on the same values, so the same bits
block   of a block only its input is kept (torch.utils.checkpoint)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Level = Literal["none", "norms", "block"]


class MadeAgain(saved_tensors_hooks):
    """While open, tensors given to `note` are not kept for backward: `make` gives them again, bit by bit.

    Autograd's saved-tensor hooks, which torch.compile does not trace: for eager models.
    """

    def __init__(self) -> None:
        self._made: dict[int, tuple[weakref.ref[Tensor], Callable[[], Tensor]]] = {}
        super().__init__(self._pack, self._unpack)

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        self._made.clear()  # the hooks are bound methods, so this object is a cycle, and these hold activations

    def note(self, t: Tensor, make: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """t itself, which backward gets from make(*inputs) from here on."""
        kept = partial(make, *(None if x is None else x.detach() for x in inputs))
        self._made[t.untyped_storage().data_ptr()] = (weakref.ref(t), kept)
        return t

    def _pack(self, t: Tensor) -> Any:
        of, make = self._made.get(t.untyped_storage().data_ptr(), (None, None))
        whole = None if of is None else of()  # alive: no other tensor can have its address
        if make is None or whole is None or t.numel() != whole.numel() or not t.is_contiguous():
            return t
        return make, t.shape

    def _unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        make, shape = kept
        with torch.no_grad():
            return make().view(shape)
