"""Triton launchers of LayerNorm and cross-entropy against fp64 formulas, in the interpreter or on a GPU.

By the one parity rule (fastgpt/parity/rule.py). Outputs lie between canaries where the caller allocates them.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton or a kernel is imported

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from draws import generator
from launchers import DEVICE, canaries_intact, guarded, randn, within
from torch import Tensor
from torch.nn import functional as F

from fastgpt.kernels import cross_entropy, layer_norm, rms_norm
from fastgpt.kernels._math import tanh
from fastgpt.ops.rms_norm import rms_norm_ref, rms_norm_torch
from fastgpt.parity import sensitivities

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, of infinities

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [F32, BF16, F16]
ROOT = Path(__file__).resolve().parents[1]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality, NaN included."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# layer_norm


def norm_reference(
    h: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor, dsum: Tensor | None, dtype: torch.dtype
):
    h, weight, bias = (None if t is None else t.detach().to(dtype).requires_grad_() for t in (h, weight, bias))
    y = F.layer_norm(h, (h.shape[-1],), weight, bias, 1e-5)
    inputs = [t for t in (h, weight, bias) if t is not None]
    grads = dict(zip((id(t) for t in inputs), torch.autograd.grad(y, inputs, dy.to(dtype)), strict=True))
    dx = grads[id(h)] if dsum is None else grads[id(h)] + dsum.to(dtype)
    return y.detach(), dx, grads.get(id(weight)), grads.get(id(bias))


def statistics(h: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + 1e-5) of each row, in fp64."""
    rows = h.double().reshape(-1, h.shape[-1])
    return rows.mean(1), (rows.var(1, unbiased=False) + 1e-5).rsqrt()


def check_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, dy: Tensor, dsum: Tensor | None
) -> None:
    kept = [None if t is None else t.clone() for t in (x, residual, weight, bias, dy, dsum)]
    y, total, stats = layer_norm.layer_norm_fwd(x, residual, weight, bias, 1e-5)
    h = x if residual is None else x + residual
    if residual is None:
        assert total is None
    else:
        assert total is not None and torch.equal(total, h)
        h = total
    dx, dweight, dbias, _ = layer_norm.layer_norm_bwd(dy, dsum, h, weight, bias, stats)
    for t in (y, dx):
        assert t.shape == x.shape and t.dtype == x.dtype and t.is_contiguous()
    inputs = (h, weight, bias, dy, dsum)
    exact, torchs = (norm_reference(*inputs, dtype) for dtype in (torch.float64, x.dtype))
    moved = sensitivities(functools.partial(norm_reference, dtype=torch.float64), *inputs)
    names, ours = ("y", "dx", "dweight", "dbias"), (y, dx, dweight, dbias)
    for name, got, t, e, sensitivity in zip(names, ours, torchs, exact, moved, strict=True):
        if e is None:
            assert got is None
        else:
            within(name, got, t, e, sensitivity)
    for a, b in zip(kept, (x, residual, weight, bias, dy, dsum), strict=True):
        assert a is None or torch.equal(a, b), "an input was changed"
    again = layer_norm.layer_norm_bwd(dy, dsum, h, weight, bias, stats)
    assert all(a is None or torch.equal(a, b) for a, b in zip((dx, dweight, dbias, None), again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(67, 770), (1, 1), (2, 3, 33), (9, 128), (300, 64), (2, 16384), (2, 16385), (3, 9001)], ids=str
)
def test_layer_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    C = shape[-1]
    x, residual, dy, dsum = (randn(*shape, seed=i, dtype=dtype) for i in range(4))
    check_norm(x, residual, randn(C, seed=5, dtype=dtype), randn(C, seed=6, dtype=dtype), dy, dsum)


@pytest.mark.parametrize("C", [1, 33, 128, 770, 9001, 16384, 16385])
def test_layer_norm_statistics(C: int) -> None:
    """Of 64 rows: a mean near zero is a cancelled sum, whose error in a few rows is a matter of luck."""
    x = randn(64, C)
    ours = layer_norm.layer_norm_fwd(x, None, None, None, 1e-5)[2]
    torchs = torch.native_layer_norm(x, (C,), None, None, 1e-5)[1:]
    checks = zip(("mean", "rstd"), ours, torchs, statistics(x), sensitivities(statistics, x), strict=True)
    for name, got, t, e, sensitivity in checks:
        within(name, got, t.flatten(), e, sensitivity)


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("C", [96, 16400])
def test_layer_norm_options(weight: bool, bias: bool, residual: bool, C: int) -> None:
    x, dy = randn(3, C, dtype=BF16), randn(3, C, seed=1, dtype=BF16)
    r = randn(3, C, seed=2, dtype=BF16) if residual else None
    w, b = (randn(C, seed=3 + i, dtype=BF16) if on else None for i, on in enumerate((weight, bias)))
    check_norm(x, r, w, b, dy, r)


def test_layer_norm_fp32_weight_with_bf16_x() -> None:
    x, dy, w, b = randn(5, 200, dtype=BF16), randn(5, 200, seed=1, dtype=BF16), randn(200, seed=2), randn(200, seed=3)
    y, _, stats = layer_norm.layer_norm_fwd(x, None, w, b, 1e-5)
    dx, dweight, dbias, _ = layer_norm.layer_norm_bwd(dy, None, x, w, b, stats)
    assert dweight is not None and dweight.dtype == F32 and y.dtype == dx.dtype == BF16
    exact = norm_reference(x, w, b, dy, None, torch.float64)
    torchs = norm_reference(x, w, b, dy, None, F32)  # eager on upcast inputs, rounded to bf16
    moved = sensitivities(functools.partial(norm_reference, dtype=torch.float64), x, w, b, dy, None)
    names = ("y", "dx", "dweight", "dbias")
    for name, got, t, e, s in zip(names, (y, dx, dweight, dbias), torchs, exact, moved, strict=True):
        assert t is not None and e is not None and got is not None
        within(name, got, t.to(got.dtype), e, s)


def strided(kind: str, t: Tensor) -> Tensor:
    """t's values (or, for expanded, its first row's) with other strides."""
    B, T, C = t.shape
    if kind == "transposed":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "sliced rows":
        wide = torch.full((B, T, C + 5), float("nan"), dtype=t.dtype, device=t.device)
        wide[..., 3 : 3 + C] = t
        return wide[..., 3 : 3 + C]
    if kind == "column stride":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "expanded":
        return t[:1, :1].expand(B, T, C)
    return guarded(t)[0]


@pytest.mark.parametrize("kind", ["transposed", "sliced rows", "column stride", "expanded", "misaligned"])
def test_layer_norm_layouts(kind: str) -> None:
    x, residual, dy, dsum = (strided(kind, randn(2, 5, 40, seed=i, dtype=F16)) for i in range(4))
    check_norm(x, residual, randn(40, seed=5, dtype=F16), randn(80, seed=6, dtype=F16)[::2], dy, dsum)


def test_layer_norm_zero_stride_gradient() -> None:
    x = randn(4, 24)
    _, _, stats = layer_norm.layer_norm_fwd(x, None, None, None, 1e-5)
    dy = torch.ones((), device=DEVICE).expand(4, 24)
    ours = layer_norm.layer_norm_bwd(dy, None, x, None, None, stats)[0]
    assert torch.equal(ours, layer_norm.layer_norm_bwd(dy.contiguous(), None, x, None, None, stats)[0])


def test_layer_norm_large_mean_tiny_variance_and_zeros() -> None:
    x = 1e3 + 1e-2 * randn(4, 1000)
    x[2] = 0.0
    check_norm(x, None, None, None, randn(4, 1000, seed=1), None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_of_one_column_has_no_gradient(dtype: torch.dtype) -> None:
    """dx is exactly dsum, whatever a rounding error leaves of a row's deviation from its mean.

    On a GPU the error is that of an FMA. The interpreter has none, so here the mean is one unit off.
    """
    h, weight, dy, dsum = (randn(n, 1, seed=i, dtype=dtype) for i, n in enumerate((40, 1, 40, 40)))
    mean = h.float().flatten().nextafter(torch.tensor(9.0, device=DEVICE))
    stats = torch.stack([mean, torch.full_like(mean, 1e-5**-0.5)])
    dx, dweight, dbias, _ = layer_norm.layer_norm_bwd(dy, dsum, h, weight.flatten(), weight.flatten(), stats)
    assert torch.equal(dx, dsum) and not dweight.any()
    (moved,) = sensitivities(lambda t: [t.double().sum(0)], dy)
    within("dbias", dbias, dy.sum(0), dy.double().sum(0), moved)


def test_layer_norm_empty_batch() -> None:
    x, w = randn(0, 8), randn(8)
    y, total, stats = layer_norm.layer_norm_fwd(x, x, w, w, 1e-5)
    assert y.shape == (0, 8) and stats.shape == (2, 0)
    dx, dweight, dbias, _ = layer_norm.layer_norm_bwd(x, None, x, w, w, stats)
    assert dx.shape == (0, 8) and torch.equal(dweight, torch.zeros(8, device=DEVICE)) and torch.equal(dbias, dweight)


# rms_norm; narrow rows and layouts are parity's cases


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(300, 64), (3, 16384), (3, 16385), (2, 65536)], ids=str)
def test_rms_norm(shape: tuple[int, ...], offset: float) -> None:
    """Many rows, and rows in column blocks; inputs between canaries, changed nowhere."""
    data = [randn(*shape, seed=i, dtype=BF16) for i in range(4)] + [randn(shape[-1], seed=5, dtype=BF16)]
    (x, residual, dy, dsum, w), buffers = zip(*(guarded(t) for t in data), strict=True)
    y, h, rstd = rms_norm.rms_norm_fwd(x, residual, w, 1e-6, offset)
    assert h is not None and torch.equal(h, x + residual)
    ours = (y, *rms_norm.rms_norm_bwd(dy, dsum, h, w, rstd, 1e-6, offset)[:2])
    found = []
    for fn, dtype in ((rms_norm_torch, BF16), (rms_norm_ref, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (h, w)]
        out = fn(*leaves, 1e-6, weight_offset=offset)
        dh, dw = torch.autograd.grad(out, leaves, dy.to(dtype))
        found.append((out.detach(), dh + dsum.to(dtype), dw))
    for name, t, torchs, exact in zip(("y", "dx", "dweight"), ours, *found, strict=True):
        within(name, t, torchs, exact, 0.0)  # bf16
    assert all(torch.equal(a, b) for a, b in zip(data, (x, residual, dy, dsum, w))) and canaries_intact(*buffers)
    again = rms_norm.rms_norm_bwd(dy, dsum, h, w, rstd, 1e-6, offset)
    assert all(same_bits(a, b) for a, b in zip(ours[1:], again[:2], strict=True))


# cross_entropy

PLAIN = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0}


def loss_reference(
    logits: Tensor, target: Tensor, weight: Tensor | None, K: int, scale: Tensor, dtype: torch.dtype, **o
):
    """Per-row loss, lse and the gradient of sum(scale * loss) by the formula; bad targets: NaN and 0."""
    x = logits.detach().to(dtype).requires_grad_()
    z = x[:, :K]
    if o["softcap"] > 0:
        z = o["softcap"] * torch.tanh(z / o["softcap"])
    w = torch.ones(K, dtype=dtype, device=x.device) if weight is None else weight.to(dtype)
    ignored = target == o["ignore_index"]
    valid = (target >= 0) & (target < K) & ~ignored
    y = target.where(valid, 0)
    logp = torch.log_softmax(z, 1)
    lse = torch.logsumexp(z, 1)
    ls = o["label_smoothing"]
    loss = -(1 - ls) * w[y] * logp.gather(1, y[:, None])[:, 0]
    if ls:
        loss = loss - ls / K * (w * logp).sum(1)
    if o["z_loss"]:
        loss = loss + o["z_loss"] * lse**2
    loss = loss.where(valid, 0.0)
    grad = torch.autograd.grad((loss * scale.to(dtype)).sum(), x)[0]
    nan = torch.where(ignored | valid, 0.0, float("nan"))
    return loss.detach() + nan, lse.detach(), grad * valid[:, None]


def check_loss(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, vocab_size: int | None = None, **options: float
) -> None:
    o = {**PLAIN, **options}
    N, V = logits.shape
    K = vocab_size or V
    scale = 0.5 + torch.rand(N, generator=generator(9)).to(DEVICE)
    arguments = (weight, o["ignore_index"], o["label_smoothing"], o["z_loss"], o["softcap"], K)
    reference = functools.partial(loss_reference, target=target, K=K, **o)
    exact, torchs = (reference(logits, weight=weight, scale=scale, dtype=d) for d in (torch.float64, F32))
    moved = sensitivities(lambda x, w, s: reference(x, weight=w, scale=s, dtype=torch.float64), logits, weight, scale)
    dtype = logits.dtype
    before = logits.clone()
    loss, stats = cross_entropy.cross_entropy_fwd(logits, target, *arguments)
    within("loss", loss, torchs[0], exact[0], moved[0])
    within("lse", stats[0] + stats[1].log(), torchs[1], exact[1], moved[1])
    grad = cross_entropy.cross_entropy_bwd(scale, logits, target, stats, *arguments)
    assert same_bits(logits, before) and grad.is_contiguous() and grad.dtype == dtype
    within("dlogits", grad, torchs[2].to(dtype), exact[2], moved[2])
    assert not grad[:, K:].any()
    assert same_bits(grad, cross_entropy.cross_entropy_bwd(scale, logits, target, stats, *arguments))
    (x, xs), (out, outs) = guarded(before), guarded(torch.zeros(N, device=DEVICE))
    cross_entropy.cross_entropy_fwd_bwd(x, out, target, weight, scale, *arguments[1:])
    within("loss in place", out, torchs[0], exact[0], moved[0])
    within("dlogits in place", x, torchs[2].to(dtype), exact[2], moved[2])
    assert not x[:, K:].any() and canaries_intact(xs, outs)


def targets(N: int, K: int) -> Tensor:
    return torch.randint(0, K, (N,), generator=generator(3)).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (70, 129), (5, 4096), (3, 5001)], ids=str)
def test_cross_entropy(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    check_loss(2 * randn(*shape, dtype=dtype), targets(*shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [777, 4500])
def test_cross_entropy_all_options_together(dtype: torch.dtype, K: int) -> None:
    y = targets(12, K)
    y[1], y[2], y[3], y[4] = 5, -1, K, 2**40  # ignored, three out of range
    w = torch.rand(K, generator=generator(1)).to(DEVICE)
    x = 3 * randn(12, K + 47, dtype=dtype)
    x[:, K:] = float("nan")  # padding must not be looked at
    check_loss(x, y, w, vocab_size=K, ignore_index=5, label_smoothing=0.1, z_loss=1e-3, softcap=8.0)


@pytest.mark.parametrize(
    "option",
    [{"label_smoothing": 0.2}, {"label_smoothing": 1.0}, {"z_loss": 1e-2}, {"softcap": 30.0}, {"weight": 1}],
    ids=str,
)
def test_cross_entropy_one_option(option: dict[str, float]) -> None:
    w = torch.rand(300, generator=generator(1)).to(DEVICE) if "weight" in option else None
    check_loss(2 * randn(9, 300), targets(9, 300), w, **{k: v for k, v in option.items() if k != "weight"})


def test_cross_entropy_large_offset_and_extremes() -> None:
    x = randn(8, 4500)
    x[0] += 1e4
    x[1] -= 1e4
    x[2] = 1e4 * x[2].sign()
    x[3, ::2] = float("-inf")
    x[4, :4400] = float("-inf")  # the first column block has no finite logit
    x[5, 7] = 1e4
    y = targets(8, 4500)
    y[3], y[4] = 1, 4450
    check_loss(x, y)
    check_loss(x[:2], y[:2], label_smoothing=0.9)


def test_cross_entropy_infinite_loss() -> None:
    x = randn(3, 50)
    x[0, 4] = float("-inf")
    x[1, :] = float("-inf")
    y = torch.tensor([4, 0, 2], device=DEVICE)
    loss, _ = cross_entropy.cross_entropy_fwd(x, y, None, -100, 0.0, 0.0, 0.0, 50)
    assert loss[0] == float("inf") and torch.isnan(loss[1]) and torch.isfinite(loss[2])


def test_cross_entropy_all_ignored_and_empty() -> None:
    check_loss(randn(4, 30), torch.full((4,), -100, device=DEVICE))
    loss, stats = cross_entropy.cross_entropy_fwd(randn(0, 30), targets(0, 30), None, -100, 0.0, 0.0, 0.0, 30)
    assert loss.shape == (0,) and stats.shape == (2, 0)


def test_cross_entropy_row_strides() -> None:
    wide = torch.full((6, 90), float("nan"), device=DEVICE)
    x = wide[:, 7:57]
    x.copy_(randn(6, 50))
    check_loss(x, targets(12, 50)[::2])
    check_loss(randn(1, 50).expand(6, 50), targets(6, 50))
    loss, scale = torch.zeros(6, device=DEVICE), torch.ones(1, device=DEVICE)
    expected = cross_entropy.cross_entropy_fwd(x, targets(6, 50), None, -100, 0.0, 0.0, 0.0, 50)
    dloss = scale.expand(6)  # zero stride
    grad = cross_entropy.cross_entropy_bwd(dloss, x, targets(6, 50), expected[1], None, -100, 0.0, 0.0, 0.0, 50)
    cross_entropy.cross_entropy_fwd_bwd(x, loss, targets(6, 50), None, scale, -100, 0.0, 0.0, 0.0, 50)
    assert torch.equal(loss, expected[0]) and torch.equal(x, grad)
    assert torch.isnan(wide[:, :7]).all() and torch.isnan(wide[:, 57:]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_rows(dtype: torch.dtype) -> None:
    x, buffer = guarded(randn(5, 4100, dtype=dtype))
    signalling = {F32: 0x7F800001, BF16: 0x7F81, F16: 0x7C01}[dtype]  # a NaN that no arithmetic leaves as it is
    x[1, :1].view(torch.int32 if dtype == F32 else torch.int16).fill_(signalling)
    before = x.clone()
    scale = torch.tensor([1.0, 1.0, 0.5, 3.0, -0.1], device=DEVICE)
    cross_entropy.scale_rows(x, scale)
    scaled = (before.float() * scale[:, None]).to(dtype)
    assert same_bits(x, scaled.where(scale[:, None] != 1, before))
    cross_entropy.scale_rows(x[2:], torch.tensor([2.0], device=DEVICE))
    assert same_bits(x[2:], (scaled[2:].float() * 2).to(dtype)) and canaries_intact(buffer)


@pytest.mark.skipif(DEVICE == "cuda", reason="Triton's interpreter only")
def test_a_scalar_condition_in_a_mask_is_refused() -> None:
    """As Triton 3.9's interpreter does; tests/conftest.py makes older ones do it."""

    @triton.jit
    def scalar_in_mask(x_ptr, C: tl.constexpr):  # type: ignore[no-untyped-def]
        c = tl.arange(0, C)
        tl.store(x_ptr + c, 1.0, (c < C) & (tl.program_id(0) == 0))

    with pytest.raises(Exception, match="mask has unsupported dtype"):
        scalar_in_mask[(1,)](torch.zeros(4), 4)


@triton.jit
def tanh_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tanh(tl.load(x_ptr + i)))


def test_polynomials_are_those_of_csrc() -> None:
    """A wrong digit may cost less than a unit in the last place: compare the constants, not the results."""
    ours, csrc = (
        {float(x) for x in re.findall(r"\d\.\d{6,}(?:e-\d+)?", (ROOT / name).read_text(encoding="utf-8"))}
        for name in ("kernels/_math.py", "csrc/core/math.h")
    )
    assert ours and ours <= csrc, ours - csrc


def test_tanh_is_as_exact_as_that_of_csrc() -> None:
    """Its polynomial and switch are those of csrc/core/math.h, which tests/test_math.py holds to 1.26."""
    x = torch.logspace(-18, 2, 2**12, dtype=torch.float64).float().to(DEVICE)
    y = torch.empty_like(x)
    tanh_kernel[(1,)](x, y, BLOCK=x.numel())
    exact = x.double().tanh()
    assert float(((y.double() - exact) / exact).abs().max()) <= 1.26 * 2.0**-23
