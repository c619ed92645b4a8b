"""Triton launchers called directly against fp64 formulas: in the interpreter on CPU tensors, or on a GPU.

The parity rule: error <= 2x (forward) or 3x (backward) PyTorch's own error in that dtype, plus one unit in the last
place of the output's scale. Every output lies between canaries where the launcher lets the caller allocate it.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton or a kernel is imported

import pytest

pytest.importorskip("triton")

from torch import Tensor
from torch.nn import functional as F

from fastgpt.kernels import adamw, cross_entropy, layer_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16, I16 = torch.float32, torch.bfloat16, torch.float16, torch.int16
DTYPES = [F32, BF16, F16]
CANARY = 7.0


def within(name: str, ours: Tensor | None, torchs: Tensor | None, exact: Tensor, factor: float) -> None:
    """The parity rule for one tensor; torchs None: no baseline, the ulp alone."""
    assert ours is not None
    assert ours.shape == exact.shape, f"{name}: {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert torch.equal(torch.isnan(ours), torch.isnan(exact)), f"{name}: NaN in other places"
    keep = torch.isfinite(exact)
    assert torch.equal(ours[~keep & ~torch.isnan(exact)].double(), exact[~keep & ~torch.isnan(exact)]), (
        f"{name}: infinities"
    )
    if not keep.any():
        return
    exact = exact[keep]
    error = (ours[keep].double() - exact).abs().max().item()
    baseline = 0.0 if torchs is None else (torchs[keep].double() - exact).abs().max().item()
    scale = exact.abs().max().item()
    ulp = torch.finfo(ours.dtype).eps * 2.0 ** torch.tensor(scale).log2().floor().item() if scale else 0.0
    assert error <= factor * baseline + ulp, f"{name}: error {error:.3g}, torch {baseline:.3g}, ulp {ulp:.3g}"


def guarded(t: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of t inside a larger buffer of canaries, misaligned by one element; and the buffer."""
    buffer = torch.full((t.numel() + 64 + 1,), CANARY, device=t.device).to(t.dtype)
    inside = buffer[33 : 33 + t.numel()].view(t.shape)
    inside.copy_(t)
    return inside, buffer


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality, NaN included."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def canaries_intact(*buffers: Tensor) -> bool:
    return all(bool((b[:33] == CANARY).all()) and bool((b[-32:] == CANARY).all()) for b in buffers)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


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
    dx, dweight, dbias = layer_norm.layer_norm_bwd(dy, dsum, h, weight, bias, stats)
    for t in (y, dx):
        assert t.shape == x.shape and t.dtype == x.dtype and t.is_contiguous()
    exact = norm_reference(h, weight, bias, dy, dsum, torch.float64)
    torchs = norm_reference(h, weight, bias, dy, dsum, x.dtype)
    for name, ours, t, e, factor in zip(
        ("y", "dx", "dweight", "dbias"), (y, dx, dweight, dbias), torchs, exact, (2, 3, 3, 3), strict=True
    ):
        if e is None:
            assert ours is None
        else:
            within(name, ours, t, e, factor)
    d = h.double().reshape(-1, x.shape[-1])
    statistics = torch.stack([d.mean(1), (d.var(1, unbiased=False) + 1e-5).rsqrt()])
    _, mean, rstd = torch.native_layer_norm(h.float(), (x.shape[-1],), None, None, 1e-5)
    within("mean", stats[0], mean.flatten(), statistics[0], 2)
    within("rstd", stats[1], rstd.flatten(), statistics[1], 2)
    for a, b in zip(kept, (x, residual, weight, bias, dy, dsum), strict=True):
        assert a is None or torch.equal(a, b), "an input was changed"
    again = layer_norm.layer_norm_bwd(dy, dsum, h, weight, bias, stats)
    assert all(a is None or torch.equal(a, b) for a, b in zip((dx, dweight, dbias), again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(67, 770), (1, 1), (2, 3, 33), (9, 128), (300, 64), (2, 16384), (2, 16385), (3, 9001)], ids=str
)
def test_layer_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    C = shape[-1]
    x, residual, dy, dsum = (randn(*shape, seed=i, dtype=dtype) for i in range(4))
    check_norm(x, residual, randn(C, seed=5, dtype=dtype), randn(C, seed=6, dtype=dtype), dy, dsum)


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
    dx, dweight, dbias = layer_norm.layer_norm_bwd(dy, None, x, w, b, stats)
    assert dweight is not None and dweight.dtype == F32 and y.dtype == dx.dtype == BF16
    exact = norm_reference(x, w, b, dy, None, torch.float64)
    torchs = norm_reference(x, w, b, dy, None, F32)  # eager on upcast inputs, rounded to bf16
    within("y", y, torchs[0].bfloat16(), exact[0], 2)
    within("dx", dx, torchs[1].bfloat16(), exact[1], 3)
    within("dweight", dweight, torchs[2], exact[2], 3)
    within("dbias", dbias, torchs[3], exact[3], 3)


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


def test_layer_norm_empty_batch() -> None:
    x, w = randn(0, 8), randn(8)
    y, total, stats = layer_norm.layer_norm_fwd(x, x, w, w, 1e-5)
    assert y.shape == (0, 8) and stats.shape == (2, 0)
    dx, dweight, dbias = layer_norm.layer_norm_bwd(x, None, x, w, w, stats)
    assert dx.shape == (0, 8) and torch.equal(dweight, torch.zeros(8, device=DEVICE)) and torch.equal(dbias, dweight)


# cross_entropy

PLAIN = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0}


def loss_reference(
    logits: Tensor, target: Tensor, weight: Tensor | None, K: int, scale: Tensor, dtype: torch.dtype, **o
):
    """Per-row loss, lse and the gradient of sum(scale * loss) by the formula in the kernel's head; bad targets: NaN, 0."""
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
    scale = 0.5 + torch.rand(N, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    arguments = (weight, o["ignore_index"], o["label_smoothing"], o["z_loss"], o["softcap"], K)
    exact = loss_reference(logits, target, weight, K, scale, torch.float64, **o)
    torchs = loss_reference(logits, target, weight, K, scale, F32, **o)
    dtype = logits.dtype
    before = logits.clone()
    loss, lse = cross_entropy.cross_entropy_fwd(logits, target, *arguments)
    within("loss", loss, torchs[0], exact[0], 2)
    within("lse", lse, torchs[1], exact[1], 2)
    grad = cross_entropy.cross_entropy_bwd(scale, logits, target, lse, *arguments)
    assert same_bits(logits, before) and grad.is_contiguous() and grad.dtype == dtype
    within("gradient", grad, torchs[2].to(dtype), exact[2], 3)
    assert not grad[:, K:].any()
    assert same_bits(grad, cross_entropy.cross_entropy_bwd(scale, logits, target, lse, *arguments))
    (x, xs), (out, outs) = guarded(before), guarded(torch.zeros(N, device=DEVICE))
    cross_entropy.cross_entropy_fwd_bwd(x, out, target, weight, scale, *arguments[1:])
    within("loss in place", out, torchs[0], exact[0], 2)
    within("gradient in place", x, torchs[2].to(dtype), exact[2], 3)
    assert not x[:, K:].any() and canaries_intact(xs, outs)


def targets(N: int, K: int) -> Tensor:
    return torch.randint(0, K, (N,), generator=torch.Generator().manual_seed(3)).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (70, 129), (5, 4096), (3, 5001)], ids=str)
def test_cross_entropy(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    check_loss(2 * randn(*shape, dtype=dtype), targets(*shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [777, 4500])
def test_cross_entropy_all_options_together(dtype: torch.dtype, K: int) -> None:
    y = targets(12, K)
    y[1], y[2], y[3], y[4] = 5, -1, K, 2**40  # ignored, three out of range
    w = torch.rand(K, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    x = 3 * randn(12, K + 47, dtype=dtype)
    x[:, K:] = float("nan")  # padding must not be looked at
    check_loss(x, y, w, vocab_size=K, ignore_index=5, label_smoothing=0.1, z_loss=1e-3, softcap=8.0)


@pytest.mark.parametrize(
    "option",
    [{"label_smoothing": 0.2}, {"label_smoothing": 1.0}, {"z_loss": 1e-2}, {"softcap": 30.0}, {"weight": 1}],
    ids=str,
)
def test_cross_entropy_one_option(option: dict[str, float]) -> None:
    w = torch.rand(300, generator=torch.Generator().manual_seed(1)).to(DEVICE) if "weight" in option else None
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
    check_loss(x[:3], y[:3], label_smoothing=0.1)


def test_cross_entropy_infinite_loss() -> None:
    x = randn(3, 50)
    x[0, 4] = float("-inf")
    x[1, :] = float("-inf")
    y = torch.tensor([4, 0, 2], device=DEVICE)
    loss, _ = cross_entropy.cross_entropy_fwd(x, y, None, -100, 0.0, 0.0, 0.0, 50)
    assert loss[0] == float("inf") and torch.isnan(loss[1]) and torch.isfinite(loss[2])


def test_cross_entropy_all_ignored_and_empty() -> None:
    check_loss(randn(4, 30), torch.full((4,), -100, device=DEVICE))
    loss, lse = cross_entropy.cross_entropy_fwd(randn(0, 30), targets(0, 30), None, -100, 0.0, 0.0, 0.0, 30)
    assert loss.shape == lse.shape == (0,)


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
    x[1, 0] = float("nan")  # not touched, so its bits stay
    before = x.clone()
    scale = torch.tensor([1.0, 1.0, 0.5, 3.0, -0.1], device=DEVICE)
    cross_entropy.scale_rows(x, scale)
    scaled = (before.float() * scale[:, None]).to(dtype)
    assert same_bits(x, scaled.where(scale[:, None] != 1, before))
    cross_entropy.scale_rows(x[2:], torch.tensor([2.0], device=DEVICE))
    assert same_bits(x[2:], (scaled[2:].float() * 2).to(dtype)) and canaries_intact(buffer)


# adamw


class State:
    """Parameters of the given sizes with random values, and what AdamW keeps for them."""

    def __init__(
        self, sizes: tuple[int, ...], dtype: torch.dtype, master: torch.dtype | None, moment: torch.dtype = F32
    ) -> None:
        self.values = [randn(n, seed=i) for i, n in enumerate(sizes)]  # fp32
        self.params = [v.to(dtype) for v in self.values]
        self.masters: list[Tensor] = []
        if master == F32:
            self.masters = [v.clone() for v in self.values]
        elif master == I16:
            high = [((v.view(torch.int32) + 0x8000) >> 16) for v in self.values]
            self.params = [h.to(I16).view(BF16) for h in high]
            self.masters = [(v.view(torch.int32) - (h << 16)).to(I16) for v, h in zip(self.values, high, strict=True)]
        else:
            self.values = [p.float() for p in self.params]
        pairs = [
            [guarded(t) for t in ts]
            for ts in (self.params, self.masters, [torch.zeros_like(v, dtype=moment) for v in self.values])
        ]
        self.buffers = [b for ts in pairs for _, b in ts]
        self.params, self.masters, self.m = ([t for t, _ in ts] for ts in pairs)
        self.v = [torch.zeros_like(m) for m in self.m]
        self.steps = torch.zeros(len(sizes) + 2, device=DEVICE)
        self.index = [i + 2 for i in range(len(sizes))][::-1]
        self.group = [i % 2 for i in range(len(sizes))]
        self.partials = torch.zeros(adamw.adamw_partials(sizes), device=DEVICE)
        self.norm = torch.full((1,), -1.0, device=DEVICE)

    def step(
        self,
        grads: list[Tensor],
        max_norm: float = 0.0,
        norm: bool = True,
        seed: int = 1,
        stochastic: bool = False,
        **scaler: Tensor,
    ) -> None:
        partials = self.partials if norm else self.partials[:0]
        adamw.adamw_prepare(grads, self.steps, self.index, partials, 0, norm)
        adamw.adamw_update(
            self.params, grads, self.m, self.v, self.masters, self.steps, self.index, self.group,
            torch.tensor([1e-2, 3e-3], device=DEVICE), [0.9, 0.8], [0.95, 0.999], [1e-8, 1e-6], [0.1, 0.0], partials,
            max_norm, scaler.get("grad_scale"), scaler.get("found_inf"), self.norm, stochastic, seed,
        )  # fmt: skip

    def fp32(self) -> list[Tensor]:
        """The exact parameters: masters, or bits put together, or the parameters."""
        if self.masters and self.masters[0].dtype == I16:
            pairs = zip(self.params, self.masters, strict=True)
            return [((p.view(I16).int() << 16) + r.int()).view(F32) for p, r in pairs]
        return self.masters or self.params


def torch_adamw(values: list[Tensor], group: list[int], dtype: torch.dtype):
    params = [torch.nn.Parameter(v.to(dtype)) for v in values]
    sets = [{"params": [p for p, g in zip(params, group, strict=True) if g == i]} for i in range(2)]
    sets[0] |= {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    sets[1] |= {"lr": 3e-3, "betas": (0.8, 0.999), "eps": 1e-6, "weight_decay": 0.0}
    return params, torch.optim.AdamW(sets, foreach=False)


SIZES = (5, 4096, 9000, 1, 0)


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
@pytest.mark.parametrize(
    "dtype,grad,master", [(F32, F32, None), (BF16, BF16, F32), (BF16, F32, I16), (F16, F16, F32)], ids=str
)
def test_adamw(dtype: torch.dtype, grad: torch.dtype, master: torch.dtype | None, max_norm: float) -> None:
    state = State(SIZES, dtype, master)
    exact, torchs = (torch_adamw(state.values, state.group, d) for d in (torch.float64, F32))
    scale = torch.tensor([4.0], device=DEVICE)
    for step in range(3):
        grads = [randn(n, seed=100 * step + i, dtype=grad) for i, n in enumerate(SIZES)]
        norms = []
        for params, optimizer in (exact, torchs):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.to(p.dtype, copy=True)  # clipping works in place
            norms.append(torch.nn.utils.clip_grad_norm_(params, max_norm or float("inf")).reshape(1))
            optimizer.step()
        state.step([g * 4 for g in grads], max_norm, grad_scale=scale)
        within("norm", state.norm, norms[1], norms[0].double(), 2)
    assert state.steps.tolist() == [0, 0, 3, 3, 3, 3, 3] and canaries_intact(*state.buffers)
    for i, (p, e, t) in enumerate(zip(state.fp32(), exact[0], torchs[0], strict=True)):
        within(f"parameter {i}", p, t.detach(), e.detach(), 2)
        assert torch.equal(state.params[i], p.to(dtype)) or master == I16  # ties go up there
        assert i == 4 or (state.params[i].float() - p).abs().max() <= torch.finfo(dtype).eps * p.abs().max()


@pytest.mark.parametrize("moment", [F32, BF16], ids=str)
def test_adamw_small_moments_and_16_bit_parameters(moment: torch.dtype) -> None:
    state = State((3000,), BF16, None, moment)
    p, g = state.params[0].double(), randn(3000, seed=7, dtype=BF16)
    state.step([g], norm=False)
    m, v = 0.1 * g.double(), 0.05 * g.double() ** 2
    within("exp_avg", state.m[0], m.to(moment), m, 2)
    within("exp_avg_sq", state.v[0], v.to(moment), v, 2)
    p = p * (1 - 1e-3) - 1e-2 * g.double() / (g.double().abs() + 1e-8)
    within("parameter", state.params[0], p.to(BF16), p, 2)
    assert state.norm.item() == -1.0, "without partials the norm must stay untouched"


def test_adamw_bias_correction_is_exact_at_every_step() -> None:
    state = State((1,), F32, None)
    for t in (1, 2, 10, 100, 1000, 5000, 20000, 10**6):
        state.params[0].zero_()
        state.m[0].fill_(1.0)
        state.v[0].fill_(1.0)
        state.steps.fill_(t - 1)
        state.group = [1]
        state.step([torch.ones(1, device=DEVICE)], norm=False)
        expected = -3e-3 / (1 - 0.8**t) / ((1 - 0.999**t) ** -0.5 + 1e-6)
        assert abs(state.params[0].item() / expected - 1) < 6e-7, f"step {t}"


@pytest.mark.parametrize("why", ["found_inf", "nan", "inf"])
@pytest.mark.parametrize("master", [None, F32, I16], ids=str)
def test_adamw_skips(why: str, master: torch.dtype | None) -> None:
    state = State((50, 4097), BF16, master)
    good = [randn(n, seed=i, dtype=BF16) for i, n in enumerate((50, 4097))]
    state.step(good)
    before = [t.clone() for t in (*state.params, *state.m, *state.v, *state.masters, state.steps)]
    bad = [g.clone() for g in good]
    if why != "found_inf":
        bad[1][4096] = float(why)
    found = torch.tensor([1.0 if why == "found_inf" else 0.0], device=DEVICE)
    state.step(bad, 1.0, norm=why != "found_inf", found_inf=found)
    after = (*state.params, *state.m, *state.v, *state.masters, state.steps)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    state.step(good, 1.0, found_inf=torch.zeros(1, device=DEVICE))
    assert state.steps[2].item() == 2 and not torch.equal(state.params[1], before[1])


def test_adamw_remainder_equals_fp32_master_bit_for_bit() -> None:
    a, b = State(SIZES, BF16, F32), State(SIZES, BF16, I16)
    for step in range(3):
        grads = [randn(n, seed=10 * step + i, dtype=BF16) for i, n in enumerate(SIZES)]
        a.step(grads, 1.0)
        b.step(grads, 1.0)
    assert all(torch.equal(x, y) for x, y in zip(a.fp32(), b.fp32(), strict=True))


def test_adamw_stochastic_rounding_is_unbiased_and_reproducible() -> None:
    def run(seed: int) -> tuple[Tensor, Tensor]:
        state = State((40000,), BF16, None)
        state.params[0].fill_(1.0)
        state.group = [1]
        state.steps.fill_(5)
        state.step([torch.ones(40000, device=DEVICE, dtype=BF16)], norm=False, seed=seed, stochastic=True)
        return state.params[0], state.steps

    first, again, other = run(1)[0], run(1)[0], run(2)[0]
    assert torch.equal(first, again) and not torch.equal(first, other)
    t = 6
    m, v = 0.2 / (1 - 0.8**t), 0.001 / (1 - 0.999**t)
    exact = 1 - 3e-3 * m / (v**0.5 + 1e-6)
    values = first.double().unique()
    assert len(values) == 2 and values[0] <= exact <= values[1] and values[1] - values[0] == 2**-8
    up = (exact - values[0]) * 2**8  # probability of the upper neighbour
    deviation = (up * (1 - up) / 40000) ** 0.5
    for sample in (first, other):
        assert abs((sample.double() == values[1]).double().mean() - up) < 5 * deviation
    same = (first == other).double().mean()
    assert abs(same - (up**2 + (1 - up) ** 2)) < 0.02, "two seeds must be independent"


def test_adamw_norm_over_two_calls_and_partials() -> None:
    a, b = [randn(9000, seed=1)], [randn(70, seed=2), randn(3, seed=3)]
    n = [adamw.adamw_partials([t.numel() for t in ts]) for ts in (a, b)]
    partials = torch.full((sum(n) + 2,), CANARY, device=DEVICE)
    steps = torch.zeros(3, device=DEVICE)
    adamw.adamw_prepare(a, steps, [0], partials, 1, True)
    adamw.adamw_prepare(b, steps, [2, 1], partials, 1 + n[0], True)
    assert partials[0] == CANARY and partials[-1] == CANARY and steps.tolist() == [1, 1, 1]
    total = torch.cat(a + b)
    within("norm", partials[1:-1].sum().sqrt(), total.norm(), total.double().norm(), 2)
    first = partials.clone()
    adamw.adamw_prepare(a, steps, [0], partials, 1, True)
    adamw.adamw_prepare(b, steps, [2, 1], partials, 1 + n[0], False)
    assert torch.equal(first, partials) and adamw.adamw_partials([]) == 0


def test_adamw_unchanged_tensors_upload_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "_tables", {})
    state = State((10, 20), F32, None)
    grads = [randn(10), randn(20)]
    state.step(grads)
    tables = adamw._tables[state.steps.device]
    known = len(tables.entries)
    state.step(grads)
    assert len(tables.entries) == known
    state.step([g.clone() for g in grads])
    assert len(tables.entries) == known + 2


# index arithmetic


@pytest.mark.skipif(DEVICE == "cuda", reason="the sparse file is host memory")
def test_addresses_past_2_to_31(tmp_path: Path) -> None:
    """Rows far apart in a sparse file: row * stride does not fit 32 bits."""
    far = 2**30 + 64
    x = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * far, dtype=BF16).as_strided((3, 32), (far, 1))
    x.copy_(randn(3, 32, dtype=BF16))
    near, y, one = x.contiguous(), targets(3, 32), torch.ones(1)
    check_norm(x, None, None, None, near, None)
    outputs = [layer_norm.layer_norm_fwd(t, None, None, None, 1e-5)[0] for t in (x, near)]
    assert torch.equal(*outputs)
    check_loss(x, y)
    cross_entropy.cross_entropy_fwd_bwd(x, torch.empty(3), y, None, one, -100, 0.0, 0.0, 0.0, 32)
    cross_entropy.cross_entropy_fwd_bwd(near, torch.empty(3), y, None, one, -100, 0.0, 0.0, 0.0, 32)
    assert torch.equal(x, near)
    cross_entropy.scale_rows(x, 2 * one)
    assert torch.equal(x, 2 * near)
