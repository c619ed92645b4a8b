"""The iteration of Muon: its error against fp64 beside that of torch.optim.Muon's own, its order, and its FLOP."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastgpt.bench.muon import peer
from fastgpt.optim import newton_schulz
from fastgpt.optim.newton_schulz import EPS, A, B, C, batches, orthogonalise

SPECTRA = {  # singular values of n, as shares of the largest
    "random": None,
    "condition 1e6": lambda k: 10 ** (-6 * k),
    "condition 1e3": lambda k: 10 ** (-3 * k),
    "one large": lambda k: torch.where(k == 0, 1.0, 1e-3),
    "one large, the others tiny": lambda k: torch.where(k == 0, 1.0, 1e-5),
    "rank a third": lambda k: (k < 1 / 3).double(),
}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def matrix(spectrum: str, rows: int, columns: int) -> Tensor:
    """Return an fp64 matrix with given singular values."""
    values = SPECTRA[spectrum]
    if values is None:
        return random(rows, columns)
    n = min(rows, columns)
    u, v = torch.linalg.qr(random(rows, n))[0], torch.linalg.qr(random(columns, n))[0]
    return (u * values(torch.arange(n, dtype=torch.float64) / (n - 1))) @ v.T


def exact(m: Tensor) -> Tensor:
    """Return the iteration in fp64, on the singular values alone."""
    u, s, vh = torch.linalg.svd(m.double(), full_matrices=False)
    s = s / s.norm().clamp(min=EPS)
    for _ in range(5):
        s = A * s + B * s**3 + C * s**5
    return (u * s) @ vh


def errors(matrices: Sequence[Tensor]) -> tuple[float, float]:
    """Return the error of the iteration over all matrices, and what is allowed: three times torch's, and a unit in the
    last place."""
    wanted, dtype = torch.stack([exact(m) for m in matrices]), matrices[0].dtype
    found, others = torch.stack(orthogonalise(matrices, dtype)), torch.stack([peer(m) for m in matrices])
    assert found.dtype == dtype
    unit = torch.finfo(dtype).eps * float(wanted.norm())
    return float((found.double() - wanted).norm()), 3 * float((others.double() - wanted).norm()) + unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(40, 160), (200, 64), (72, 96), (64, 64)], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_error_is_torchs(
    spectrum: str, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(newton_schulz, "BLOCK", 24)  # whole blocks and a rest
    error, allowed = errors([matrix(spectrum, *shape).to(dtype)])
    assert error <= allowed


@pytest.mark.parametrize("shape", [(1, 5), (7, 2), (3, 3)], ids=str)
def test_the_error_of_small_ones_is_torchs(shape: tuple[int, int]) -> None:
    error, allowed = errors(list(random(50, *shape).float()))
    assert error <= allowed


@pytest.mark.parametrize("scale", [1e-12, 1e-5, 1e15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales(scale: float, dtype: torch.dtype) -> None:
    error, allowed = errors([(scale * random(40, 160)).to(dtype)])
    assert error <= allowed


def test_zero_stays_zero_and_inputs_stay_as_they_are() -> None:
    given = [torch.zeros(4, 9), random(4, 9).float(), random(9, 4).float(), random(5, 5).float()]
    copies = [m.clone() for m in given]
    zero, *_ = orthogonalise(given, torch.float32)
    assert not zero.any() and all(torch.equal(m, copy) for m, copy in zip(given, copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_result_is_in_the_place_of_its_matrix(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newton_schulz, "MOST", 2 * 4 * 9)  # two of the four wide ones at a time
    shapes = [(4, 9), (5, 5), (9, 4), (4, 9), (2, 3), (4, 9), (5, 5)]
    assert batches([torch.Size(shape) for shape in shapes]) == [[0, 2], [3, 5], [1, 6], [4]]
    given = [(i + 1) * random(*shape).to(dtype) for i, shape in enumerate(shapes)]
    for m, found in zip(given, orthogonalise(given, dtype), strict=True):
        (single,) = orthogonalise([m], dtype)
        torch.testing.assert_close(found, single)


def test_flop_are_those_of_the_formula() -> None:
    """The docstring's formula, in units of 2 n^3, for the matrices of GPT-2 124M; s is 5/8 there."""
    s = 5 / 8
    for rows, columns in ((2304, 768), (768, 768), (768, 3072)):
        r = max(rows, columns) / 768
        wide = {torch.float32: 2 * r * (1 + s) + 14 * s, torch.bfloat16: 3 * r * (1 + s) + 11 * s}
        for dtype, units in wide.items():
            with FlopCounterMode(display=False) as counter:
                orthogonalise([torch.empty(rows, columns, device="meta")], dtype)
            assert counter.get_total_flops() == (units if r >= 2 else 5 * (s * r + s + r)) * 2 * 768**3
