"""Recompute activations in backward instead of keeping them, which saves memory for a little time.

none    keep everything that backward needs
norms   recompute outputs of norms and of the MLP's activation, which only the next matmul needs, from their inputs,
        which are kept anyway: the same kernels on the same values, so the same bits
block   keep only the input of each block (torch.utils.checkpoint)
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
    """Context in which tensors passed to `note` are not kept for backward: `make` recomputes them bit for bit.

    It uses autograd's saved-tensor hooks, which torch.compile does not trace, so it works for eager models only.
    """

    def __init__(self) -> None:
        self._made: dict[int, tuple[weakref.ref[Tensor], Callable[[], Tensor]]] = {}
        super().__init__(self._pack, self._unpack)

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        self._made.clear()  # the hooks are bound methods, so this object is a cycle, and these hold activations

    def note(self, t: Tensor, make: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """Return t; from here on, backward recomputes it as make(*inputs)."""
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
