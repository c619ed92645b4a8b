"""cross_entropy over rows that a kernel holds while it computes their gradient: GPT-2's vocabulary and the like."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import ops, parity
from fastgpt.core.backend import use
from fastgpt.ops.cross_entropy import CROSS_ENTROPY_FWD_BWD, cross_entropy_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON = pytest.mark.parametrize("name", parity.backends_here("cross_entropy"))
# columns, classes: padded, not padded so rows begin anywhere, and the shortest rows that the Triton kernel holds
SHAPES = pytest.mark.parametrize("columns,classes", [(50304, 50257), (50257, 50257), (24592, 24576)])


def rows(columns: int, classes: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (7, columns), targets and factors of the rows. Two rows do not count, of which one is not a number;
    one has a logit of -inf, one has no other."""
    generator = torch.Generator().manual_seed(columns)
    logits = (3 * torch.randn(7, columns, generator=generator)).to(dtype)
    target = torch.tensor([classes - 1, -100, 0, 20_000, classes, 17, 5])
    logits[1], logits[3, 7] = math.nan, -math.inf
    logits[5, :classes], logits[5, 17] = -math.inf, 2.0
    logits[:, classes:] = math.nan
    return logits.to(DEVICE), target.to(DEVICE), torch.linspace(-1, 2, 7).to(DEVICE)


@ON
@SHAPES
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_every_row_has_its_loss_and_gradient(
    name: str, columns: int, classes: int, z_loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["fastgpt.ops.cross_entropy"], "checks_values", lambda t: False)
    logits, target, scale = rows(columns, classes)
    options: dict[str, Any] = dict(vocab_size=classes, z_loss=z_loss, reduction="none")
    exact = torch.where(logits.isnan(), 0.0, logits.double()).requires_grad_()
    wanted = cross_entropy_ref(exact, target, **options)
    counted = (target != -100) & (target < classes)
    (wanted * scale)[counted].sum().backward()
    assert exact.grad is not None
    leaf = torch.zeros_like(logits).requires_grad_()
    with use(strict=True, cross_entropy=name):
        loss = ops.cross_entropy(leaf + logits, target, inplace=True, **options)
        loss.backward(scale)
    assert leaf.grad is not None
    assert loss[1] == 0 and loss[4].isnan() and not leaf.grad[~counted].any() and not leaf.grad[:, classes:].any()
    torch.testing.assert_close(loss[counted].double(), wanted[counted], rtol=1e-6, atol=1e-6)
    largest = exact.grad.abs().amax(1, keepdim=True)
    assert bool(((leaf.grad.double() - exact.grad).abs() <= 2.0**-8 * exact.grad.abs() + 1e-7 * largest).all())


@ON
@SHAPES
def test_runs_are_bitwise_equal(name: str, columns: int, classes: int) -> None:
    logits, target, scale = rows(columns, classes)
    runs = []
    for _ in range(2):
        z, loss = logits.clone(), torch.empty(7, device=DEVICE)
        CROSS_ENTROPY_FWD_BWD[name](z, loss, target, None, scale, -100, 0.0, 1e-3, 0.0, classes)
        runs.append((z.view(torch.int16), loss.view(torch.int32)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@ON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smoothing,softcap", [(0.0, 0.0), (0.1, 0.0), (0.0, 300.0)])
@pytest.mark.parametrize("step", [0.0, 60.0, -60.0, 200.0])
def test_the_largest_logit_may_be_in_any_part_of_a_row(
    name: str, dtype: torch.dtype, smoothing: float, softcap: float, step: float
) -> None:
    """The CPU kernel shifts exponentials by the largest logit of the 1024 columns so far, and rescales them later."""
    columns, classes = 3010, 3001  # the last of three parts ends within a vector
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(6, columns, generator=generator) + torch.arange(columns) // 1024 * step
    logits[2, :1100] = -math.inf if smoothing == 0 else -500.0
    logits[:, classes:] = math.nan
    logits = logits.to(dtype)
    target, weight = torch.tensor([0, 3000, 1500, 1023, 1024, 2990]), torch.rand(classes, generator=generator) + 0.1
    scale = torch.linspace(-1, 2, 6)
    exact = logits.double()[:, :classes].requires_grad_()
    options: dict[str, Any] = dict(label_smoothing=smoothing, z_loss=1e-3, softcap=softcap, reduction="none")
    wanted = cross_entropy_ref(exact, target, weight=weight.double(), **options)
    wanted.backward(scale.double())
    assert exact.grad is not None
    z, loss = logits.to(DEVICE), torch.empty(6, device=DEVICE)
    moved = [t.to(DEVICE) for t in (target, weight, scale)]
    CROSS_ENTROPY_FWD_BWD[name](z, loss, *moved, -100, smoothing, 1e-3, softcap, classes)
    torch.testing.assert_close(loss.cpu().double(), wanted.detach(), rtol=2e-6, atol=1e-6)
    error, grad = (z.cpu().double()[:, :classes] - exact.grad).abs(), exact.grad.abs()
    unit = 0.0 if dtype == torch.float32 else 2.0**-8
    absolute = 1e-6 + softcap * 2.0**-24  # capped logits are rounded, too
    assert bool((error <= unit * grad + absolute * grad.amax(1, keepdim=True)).all()) and not z[:, classes:].any()


@pytest.mark.parametrize(
    "columns,classes,step,offset,dtype,parts",
    [
        (50304, 50257, 50304, 0, torch.bfloat16, 51200),
        (51200, 49152, 51200, 0, torch.float16, 51200),
        (32768, 32000, 40000, 0, torch.bfloat16, 32768),
        (50257, 50257, 50257, 0, torch.bfloat16, None),  # rows begin anywhere
        (50304, 50257, 50304, 8, torch.bfloat16, 51200),
        (50304, 50257, 50304, 4, torch.bfloat16, None),
        (50304, 50257, 50304, 0, torch.float32, None),
        (40000, 40000, 40000, 0, torch.bfloat16, None),
        (51216, 51200, 51216, 0, torch.bfloat16, None),
        (24576, 24560, 24576, 0, torch.bfloat16, None),
    ],
)
def test_rows_that_fit_the_parts_of_the_triton_kernel(
    columns: int, classes: int, step: int, offset: int, dtype: torch.dtype, parts: int | None
) -> None:
    pytest.importorskip("triton")
    from fastgpt.kernels.cross_entropy import held_meta

    memory = torch.empty(offset + 2 * step, dtype=dtype)
    assert memory.data_ptr() % 16 == 0
    meta = held_meta(memory.as_strided((2, columns), (step, 1), offset), classes)
    assert (None if meta is None else meta["B0"] + meta["B1"] + meta["B2"]) == parts
