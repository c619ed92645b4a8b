"""Inputs of a parity case: seeded values in a memory layout, between canaries that must not be read or written.

Layouts, by the strides of a tensor whose contiguous form would be (..., R, C):

    contiguous   transposed (the last two dimensions swapped in memory)   permuted (the two before the last)
    sliced       a window of a tensor that is larger in every dimension
    rows         every other row of a longer tensor (of a vector: every other element)
    expanded     its first row everywhere, strides 0 but the last (of a vector: its first element, stride 0)
    broadcast    its first element everywhere, all strides 0: the upstream gradient of `y.sum().backward()`
    misaligned   contiguous, one element after an aligned address

PyTorch has no negative strides. A tensor with too few dimensions for its layout is contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.parity.rule import Case, moved

MARGIN = 64  # elements before and after: keeps addresses aligned, and shows the overrun of a vector access
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
NAN_BITS = {torch.float64: 0x7FFD_5AA5_5AA5_5AA5, torch.float32: 0x7FD5_AA55, torch.float16: 0x7ED5}


def canaries(n: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return n elements of `dtype`, as integers, that no kernel writes: NaN with a payload, or indices far outside."""
    bits = NAN_BITS.get(dtype, {8: -0x5AA5_5AA5_5AA5, 4: -0x5AA5_5AA5, 2: 0x7FD5, 1: 0xA5}[dtype.itemsize])
    return torch.full((n,), bits, dtype=INTEGERS[dtype.itemsize], device=device)


def view(memory: Tensor, dtype: torch.dtype, offset: int, shape: tuple[int, ...], strides: list[int]) -> Tensor:
    """Return a tensor on this memory that autograd does not treat as a view, so it may be written to."""
    typed = memory.view(dtype)
    return typed.new_zeros(0).set_(typed.untyped_storage(), offset, shape, strides)


def geometry(shape: tuple[int, ...], layout: str) -> tuple[int, int, list[int]]:
    """Return the number of elements of the memory, the offset of the first, and the strides of a tensor in this
    layout."""
    n = len(shape)
    outer, first, step, order = list(shape), [0] * n, [1] * n, list(range(n))
    if layout == "sliced" and n:
        outer, first = [*(s + 2 for s in shape[:-1]), shape[-1] + 5], [*[1] * (n - 1), 2]
    elif layout == "rows" and n:
        outer[max(0, n - 2)] *= 2
        step[max(0, n - 2)] = 2
    elif layout == "transposed" and n >= 2:
        order[-2:] = [n - 1, n - 2]
    elif layout == "permuted" and n >= 3:
        order[-3:-1] = [n - 2, n - 3]
    whole, size = [0] * n, 1  # strides in the whole memory
    for d in reversed(order):
        whole[d] = size
        size *= outer[d]
    offset = sum(f * w for f, w in zip(first, whole)) + (layout == "misaligned")
    strides = [s * w for s, w in zip(step, whole)]
    if layout == "expanded":
        strides = [0] * (n - 1) + [strides[-1] if n > 1 else 0] * (n > 0)
    if layout == "broadcast":
        strides = [0] * n
    return size + (layout == "misaligned"), offset, strides


class Guarded:
    """A copy of t in this layout, in separate memory whose other elements hold canaries.

    In a dimension of stride 0, all values are those of the first element.
    """

    def __init__(self, t: Tensor, layout: str, written: bool) -> None:
        size, offset, strides = geometry(tuple(t.shape), layout)
        self.memory = canaries(size + 2 * MARGIN, t.dtype, t.device)
        self.place = (t.dtype, MARGIN + offset, tuple(t.shape), strides)
        self.written = written
        self.tensor = view(self.memory, *self.place)
        once = tuple(slice(0, 1) if s == 0 else slice(None) for s in strides)
        self.tensor[once] = t[once]
        self.before = self.memory.clone()

    def harmed(self) -> bool:
        """Return whether a canary changed, or a value that the op may not write."""
        after = self.memory
        if self.written:
            after = after.clone()
            view(after, *self.place).copy_(view(self.before, *self.place))
        return not torch.equal(after, self.before)


class Inputs:
    """Seeded tensors of one case, rounded to their dtype, in its layouts. With `wide`, the same values in fp64.

    shift (with `wide`): number of a draw of rounding errors, which moves each value by 2^-24 of itself; 0: none.
    """

    def __init__(self, case: Case, device: str, wide: bool, shift: int = 0) -> None:
        self.case, self.device, self.wide, self.shift, self.seed = case, device, wide, shift, 1000 * case.seed
        self.guarded: list[Guarded] = []

    def place(self, t: Tensor, layout: str | None = None, written: bool = False) -> Tensor:
        """Return t in guarded memory, in `layout` or the input layout of the case. written: the op writes to it."""
        guarded = Guarded(t.to(self.device), self.case.layout if layout is None else layout, written)
        self.guarded.append(guarded)
        if not self.wide or not t.is_floating_point():
            return guarded.tensor
        exact = guarded.tensor.double()
        if not self.shift:
            return exact
        return moved(exact, self.shift, len(self.guarded))

    def _random(self, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        self.seed += 1
        g = torch.Generator().manual_seed(self.seed)
        return (torch.randn(shape, generator=g, dtype=torch.float64) * scale + shift).to(dtype)

    def tensor(
        self, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0, written: bool = False
    ) -> Tensor:
        """Return the next random tensor, in the layout of inputs."""
        return self.place(self._random(shape, dtype, scale, shift), written=written)

    def leaf(self, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        """Return the next random tensor, as a leaf that requires grad."""
        return self.tensor(shape, dtype, scale, shift).requires_grad_()

    def grad(self, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        """Return the next random tensor, in the layout of upstream gradients."""
        return self.place(self._random(shape, dtype, scale, shift), self.case.grad_layout)

    def harmed(self) -> list[str]:
        """Return the tensors, by number and shape, whose canaries or (unless `written`) values changed."""
        return [f"input {i} {g.place[2]}" for i, g in enumerate(self.guarded) if g.harmed()]
