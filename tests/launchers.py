"""Tensors between canaries and the parity rule, for the tests that call Triton launchers directly."""

from __future__ import annotations

import torch
from draws import generator
from torch import Tensor

from fastgpt.parity import allowed_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CANARY = 7.0


def within(name: str, ours: Tensor | None, torchs: Tensor, exact: Tensor, sensitivity: float) -> None:
    """Check one tensor by the parity rule; NaN and infinities must stand in the same places.

    A name that begins with d is a gradient. sensitivity: of the exact result; it counts for fp32 outputs.
    """
    assert ours is not None and ours.shape == exact.shape
    assert torch.equal(torch.isnan(ours), torch.isnan(exact)), f"{name}: NaN in other places"
    keep, infinite = torch.isfinite(exact), torch.isinf(exact)
    assert torch.equal(ours[infinite].double(), exact[infinite]), f"{name}: infinities"
    if keep.any():
        exact = exact[keep]
        error, baseline = ((t[keep].double() - exact).abs().max().item() for t in (ours, torchs))
        allowed = allowed_error(name, exact, baseline, ours.dtype, sensitivity)
        assert error <= allowed, f"{name}: error {error:.3g}, torch {baseline:.3g}, allowed {allowed:.3g}"


def guarded(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return a copy of t inside a larger buffer of canaries, misaligned by one element; and the buffer."""
    buffer = torch.full((t.numel() + 64 + 1,), CANARY, device=t.device).to(t.dtype)
    inside = buffer[33 : 33 + t.numel()].view(t.shape)
    inside.copy_(t)
    return inside, buffer


def canaries_intact(*buffers: Tensor) -> bool:
    return all(bool((b[:33] == CANARY).all()) and bool((b[-32:] == CANARY).all()) for b in buffers)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(DEVICE, dtype)
