"""Explicit positions for the parity of rope and embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.parity.inputs import Inputs


def rows(inputs: Inputs, top: int, shape: tuple[int, ...], kind: str | None) -> Tensor | None:
    """Return positions in [0, top): one row for all sequences ('shared'), one row for each ('own'), or None."""
    if kind is None:
        return None
    g = torch.Generator().manual_seed(5)
    return inputs.place(torch.randint(top, shape[-1:] if kind == "shared" else shape, generator=g))
