"""No access outside a tensor: canaries surround the inputs (in every parity case) and the outputs (here)."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import parity
from fastgpt.core import backend
from fastgpt.parity.inputs import MARGIN, Guarded, canaries, geometry, view

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = [(op, name) for op in parity.SUBJECTS for name in parity.backends_here(op)]
SHAPES = [(), (5,), (0,), (3, 4), (1, 1), (0, 16), (2, 3, 4), (2, 3, 4, 5)]


@pytest.mark.parametrize("shape,layout", itertools.product(SHAPES, parity.GRAD_LAYOUTS), ids=str)
def test_layouts_are_what_they_say(shape: tuple[int, ...], layout: str) -> None:
    t = torch.randn(shape)
    got = Guarded(t, layout, False)
    assert got.tensor.shape == t.shape and not got.harmed()
    size, offset, strides = geometry(shape, layout)
    last = offset + sum(s * (n - 1) for s, n in zip(strides, shape)) if t.numel() else 0
    assert 0 <= last < size + 1 and got.memory.numel() == size + 2 * MARGIN
    if t.numel() and layout in ("contiguous", "misaligned"):
        assert (got.tensor.data_ptr() % 16 == 0) == (layout == "contiguous")
    one = t[(0,) * t.dim()] if t.numel() else t
    expected = {"broadcast": one.expand(shape) if t.numel() else t, "expanded": t[:1].expand(shape) if shape else t}
    if layout == "expanded" and len(shape) > 2:
        expected["expanded"] = t[(0,) * (t.dim() - 1)].expand(shape)
    assert torch.equal(got.tensor, expected.get(layout, t))
    if shape == (2, 3, 4):
        known = {"contiguous": [12, 4, 1], "transposed": [12, 1, 3], "permuted": [4, 8, 1], "sliced": [45, 9, 1]}
        known |= {"rows": [24, 8, 1], "expanded": [0, 0, 1], "broadcast": [0, 0, 0], "misaligned": [12, 4, 1]}
        assert strides == known[layout]


def wrong_at(case: parity.Case, where: str) -> list[parity.Row]:
    """Return the rows of a LayerNorm that reads or writes out of bounds."""

    def ours(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        memory = x.detach().view(x.shape).untyped_storage()
        flat = torch.empty(0, dtype=x.dtype).set_(memory)  # type: ignore[call-overload]
        if where == "value":
            flat[x.storage_offset()] += 1
        elif where == "before":
            flat[x.storage_offset() - 1] = 0
        elif where == "behind":
            flat[-1] = float("nan")  # a NaN with other bits
        elif where == "read":
            x = x + 0 * flat[x.storage_offset() - 1]
        return truth.torch(x, *args, **kwargs)

    truth = parity.SUBJECTS["layer_norm"]
    parity.SUBJECTS["layer_norm"] = dataclasses.replace(truth, ours=ours)
    try:
        return parity.check(case, "torch")
    finally:
        parity.SUBJECTS["layer_norm"] = truth


@pytest.mark.parametrize("where", ["nowhere", "value", "before", "behind", "read"])
def test_harm_is_over_the_bound(where: str) -> None:
    options = (("residual", True),)
    for layout in ("contiguous", "transposed", "sliced", "rows", "misaligned"):
        rows = wrong_at(parity.Case("layer_norm", torch.float32, layout, (2, 3, 33), options), where)
        assert any(not r.ratio <= 1 for r in rows) == (where != "nowhere")
        assert any("overwritten" in r.output for r in rows) == (where in ("value", "before", "behind"))


class Allocations:
    """Replaces PyTorch's uninitialised allocations: each lies between canaries and is filled with them."""

    def __init__(self) -> None:
        self.made: list[tuple[Tensor, Tensor]] = []  # memory, and the content of its margins

    def strided(self, shape: Any, strides: Any, dtype: torch.dtype, device: Any) -> Tensor:
        span = 0 if 0 in shape else 1 + sum(s * (n - 1) for s, n in zip(strides, shape))
        memory = canaries(span + 2 * MARGIN, dtype, device)
        self.made.append((memory, canaries(MARGIN, dtype, device)))  # clone would allocate here
        return view(memory, dtype, MARGIN, tuple(shape), list(strides))

    def empty(self, *size: Any, dtype: Any = None, device: Any = None) -> Tensor:
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        strides = geometry(shape, "contiguous")[2]
        return self.strided(shape, strides, dtype or torch.get_default_dtype(), device or "cpu")

    def empty_like(self, t: Tensor, dtype: Any = None, **_: Any) -> Tensor:
        strides = (
            torch._prims_common.clone_preserve_strides(t.detach().to("meta")).stride() if t.numel() else t.stride()
        )
        return self.strided(t.shape, strides, dtype or t.dtype, t.device)

    def zeros_like(self, t: Tensor, dtype: Any = None, **_: Any) -> Tensor:
        return self.empty_like(t, dtype).zero_()

    def new_empty(self, t: Tensor, *size: Any, dtype: Any = None, device: Any = None) -> Tensor:
        return self.empty(*size, dtype=dtype or t.dtype, device=device or t.device)

    def overrun(self) -> list[int]:
        """Return the number of canaries that were overwritten."""
        return [
            memory.numel() - 2 * MARGIN
            for memory, margin in self.made
            if not torch.equal(memory[:MARGIN], margin) or not torch.equal(memory[-MARGIN:], margin)
        ]


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch) -> Allocations:
    """Check allocations from Python (Triton launchers, optimizer state)."""
    made = Allocations()
    for name in ("empty", "empty_like", "zeros_like"):
        monkeypatch.setattr(torch, name, getattr(made, name))
    monkeypatch.setattr(Tensor, "new_empty", lambda t, *size, **k: made.new_empty(t, *size, **k))
    return made


@pytest.mark.parametrize("op", [op for op, name in KERNELS if name == "triton"])
def test_triton_writes_outputs_whole_and_not_over(op: str, allocations: Allocations) -> None:
    subject = parity.SUBJECTS[op]
    plain = [c for c in parity.cases(op) if c.layouts == "contiguous/contiguous"]
    small = [c for c in plain if 0 < torch.Size(c.shape).numel() < 6000]
    for case in {(c.dtype, c.shape, c.options[:1]): c for c in small}.values():
        with backend.use(strict=True, **{op: "triton"}):
            ours = subject.run(case, subject.ours, parity.Inputs(case, DEVICE, wide=False))
        with backend.use(all="torch"):
            exact = subject.run(case, subject.reference, parity.Inputs(case, DEVICE, wide=True))
        for key, value in ours.items():
            assert not value.isnan().any() or exact[key].isnan().any(), f"{case}: {key} has elements nobody wrote"
        assert not allocations.overrun(), f"{case}: allocations of these sizes were written over"
    assert len(allocations.made) > len(small)


def test_an_overrun_is_seen(allocations: Allocations) -> None:
    t = torch.empty(3, 5)
    t.fill_(1)
    assert not allocations.overrun()
    t.as_strided((16,), (1,)).fill_(1)
    assert allocations.overrun() == [15]


def checked_malloc(*command: str) -> subprocess.CompletedProcess[str]:
    """Run Python under glibc's malloc checks: new memory holds garbage, and a byte written after a block aborts at
    free."""
    env = os.environ | {"LD_PRELOAD": "libc_malloc_debug.so.0", "TRITON_INTERPRET": "1"}
    env["GLIBC_TUNABLES"] = "glibc.malloc.check=3:glibc.malloc.perturb=165"
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_native_kernels_write_outputs_whole_and_not_over(name: str) -> None:
    """csrc allocates inside PyTorch, out of reach of Python, so all parity cases run under a malloc that checks."""
    if name not in parity.backends_here("layer_norm") or DEVICE == "cuda":
        pytest.skip(f"needs the {name} kernels, compiled for the host")
    overrun = "import ctypes, torch; t = torch.empty(33); ctypes.memset(t.data_ptr() + 132, 0, 1); del t"
    if checked_malloc("-c", overrun).returncode != -signal.SIGABRT:
        pytest.skip("needs glibc's libc_malloc_debug")
    done = checked_malloc("-m", "fastgpt.parity", name)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
