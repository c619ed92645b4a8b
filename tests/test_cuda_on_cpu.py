"""The CUDA kernels on the CPU: every launcher of csrc/cuda against fp64. cuda_on_cpu/test_equipment.py proves that this
equipment can fail.

Parity (DESIGN.md): error(ours) <= 2x (forward) or 3x (backward) the error of PyTorch's own op in that dtype, plus one
unit in the last place of the output's scale (32 units at scale 1 where the exact result is zero).
"""

from __future__ import annotations

import importlib.util
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("pybind11")
if shutil.which("g++") is None:
    pytest.skip("g++ is not on PATH", allow_module_level=True)

PATH = Path(__file__).parent / "cuda_on_cpu" / "emulator.py"
spec = importlib.util.spec_from_file_location("cuda_on_cpu_emulator", PATH)
assert spec is not None and spec.loader is not None
emulator = importlib.util.module_from_spec(spec)
spec.loader.exec_module(emulator)

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def kernels() -> Any:
    return emulator.Kernels(emulator.build())


def assert_parity(name: str, ours: Tensor | None, base: Tensor, exact: Tensor, factor: float) -> None:
    assert ours is not None, name
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    unit = torch.finfo(ours.dtype).eps * (2.0 ** math.floor(math.log2(scale)) if scale > 0 else 32.0)
    error, allowed = (float((t.double() - exact).abs().max()) for t in (ours, base))
    assert error <= factor * allowed + unit, f"{name}: error {error:.3g} > {factor} * {allowed:.3g} + {unit:.3g}"


# ---- layer_norm ----


def layer_norm_torch(
    h: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor, dsum: Tensor | None
) -> list[Tensor]:
    """y, dx, dweight, dbias by PyTorch; fp64 in, fp64 out."""
    leaves: list[Any] = [None if t is None else t.detach().clone().requires_grad_() for t in (h, weight, bias)]
    y = F.layer_norm(leaves[0], (h.shape[1],), leaves[1], leaves[2], 1e-5)
    grads = torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y.dtype))
    dx = grads[0] if dsum is None else grads[0] + dsum
    return [y.detach(), dx, *grads[1:]]


def check_layer_norm(
    kernels: Any, x: Tensor, residual: Tensor | None, weights: str, wide: bool, offset: int = 0
) -> None:
    dtype, (n, c) = x.dtype, x.shape
    weight_dtype = torch.float32 if wide else dtype
    weight = kernels.place(torch.randn(c).to(weight_dtype)) if "w" in weights else None
    bias = kernels.place(torch.randn(c).to(weight_dtype)) if "b" in weights else None
    dy, dsum = torch.randn(n, c).to(dtype), torch.randn(n, c).to(dtype) if residual is not None else None
    before = x.clone()
    y, total, stats = kernels.layer_norm_fwd(x, residual, weight, bias, 1e-5, offset)
    h = x if residual is None else x + residual
    if residual is not None:
        assert torch.equal(total, h)
    assert torch.equal(x, before)
    dx, dweight, dbias = kernels.layer_norm_bwd(dy, dsum, h, weight, bias, stats)
    wide_of: list[Any] = [None if t is None else t.double() for t in (h, weight, bias, dy, dsum)]
    exact = layer_norm_torch(*wide_of)
    base = layer_norm_torch(h, weight, bias, dy, dsum)
    ours = [y, dx] + [t for t in (dweight, dbias) if t is not None]
    for name, a, b, e in zip(("y", "dx", "dweight/dbias", "dbias"), ours, base, exact, strict=False):
        assert_parity(name, a, b, e, 2 if name == "y" else 3)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 3, 37])
@pytest.mark.parametrize("c", [1, 7, 64, 770, 1024, 5000])
def test_layer_norm(kernels: Any, dtype: torch.dtype, n: int, c: int) -> None:
    torch.manual_seed(c + n)
    wide = dtype != torch.float32 and c == 770
    check_layer_norm(kernels, torch.randn(n, c).to(dtype), None, "wb", wide)
    check_layer_norm(kernels, torch.randn(n, c).to(dtype), torch.randn(n, c).to(dtype), "w", False)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("c", [17000, 8200, 8201])
def test_layer_norm_wide_rows(kernels: Any, dtype: torch.dtype, c: int) -> None:
    torch.manual_seed(c)
    check_layer_norm(kernels, torch.randn(3, c).to(dtype), torch.randn(3, c).to(dtype), "wb", False)
    check_layer_norm(kernels, torch.randn(9, c).to(dtype), None, "", False)


@pytest.mark.parametrize("dtype", FLOATS)
def test_layer_norm_layouts(kernels: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = torch.randn(5, 200).to(dtype)
    check_layer_norm(kernels, base[:, :64], base[:, 64:128], "wb", False)  # rows 200 apart, 16-byte aligned
    check_layer_norm(kernels, base[:, 1:65], None, "b", False, offset=3)  # off alignment
    check_layer_norm(kernels, base[:1, :64].expand(5, 64), base[:, 72:136], "wb", False)  # row stride 0
    check_layer_norm(kernels, (base[:, :64].float() * 1e-3 + 100).to(dtype), None, "wb", False)  # large mean
    check_layer_norm(kernels, torch.zeros(3, 64, dtype=dtype), None, "wb", False)


def test_layer_norm_more_rows_than_blocks(kernels: Any) -> None:
    torch.manual_seed(0)
    check_layer_norm(kernels, torch.randn(4000, 33), None, "wb", False)


# ---- cross_entropy ----


def cross_entropy_formula(logits: Tensor, target: Tensor, options: dict[str, Any]) -> Tensor:
    """Loss rows in logits' dtype."""
    k = options.get("vocab_size") or logits.shape[1]
    cap, smoothing = options.get("softcap", 0.0), options.get("label_smoothing", 0.0)
    z = logits[:, :k]
    z = cap * torch.tanh(z / cap) if cap > 0 else z
    weight = options.get("weight")
    w = z.new_ones(k) if weight is None else weight.to(z.dtype)
    logp, y = z.log_softmax(-1), target.clamp(0, k - 1)
    loss = -(1 - smoothing) * w[y] * logp.gather(1, y[:, None])[:, 0]
    loss = loss - smoothing / k * (w * logp).sum(-1) if smoothing > 0 else loss
    loss = loss + options.get("z_loss", 0.0) * z.logsumexp(-1).square()
    ignored = target == options.get("ignore_index", -100)
    bad = ((target < 0) | (target >= k)) & ~ignored
    return torch.where(ignored, 0.0, torch.where(bad, math.nan, loss)).to(z.dtype)


def reference(
    logits: Tensor, target: Tensor, scale: Tensor, options: dict[str, Any], wide: torch.dtype
) -> list[Tensor]:
    """Loss rows and gradient computed in `wide`, the gradient in logits' dtype unless fp64; 0 where nothing counts."""
    leaf = logits.to(wide, copy=True).requires_grad_()
    loss = cross_entropy_formula(leaf, target, options)
    counted = loss.detach().isfinite() & (target != options.get("ignore_index", -100))
    (torch.where(counted, loss, 0.0) * scale.to(wide)).sum().backward()
    assert leaf.grad is not None
    grad = torch.where(counted[:, None], leaf.grad, 0.0)
    return [loss.detach(), grad if wide == torch.float64 else grad.to(logits.dtype)]


def check_cross_entropy(kernels: Any, logits: Tensor, target: Tensor, offset: int = 0, **options: Any) -> None:
    n, v = logits.shape
    scale = torch.randn(n)
    exact = reference(logits, target, scale, options, torch.float64)
    base = reference(logits, target, scale, options, torch.float32)
    before = logits.clone()
    loss, lse = kernels.cross_entropy_fwd(logits, target, **options)
    grad = kernels.cross_entropy_bwd(scale, logits, target, lse, offset, **options)
    assert torch.equal(logits, before)
    inplace = kernels.empty(n, logits.stride(0) or v, dtype=logits.dtype, offset=offset)[:, :v].copy_(logits)
    loss_too = kernels.cross_entropy_fwd_bwd(inplace, target, scale, **options)
    assert torch.equal(loss.isnan(), exact[0].isnan()) and torch.equal(loss_too.isnan(), exact[0].isnan())
    for ours in (loss, loss_too):
        assert_parity("loss", ours.nan_to_num(), base[0].nan_to_num(), exact[0].nan_to_num(), 2)
    for name, ours in (("gradient", grad), ("gradient in place", inplace)):
        assert_parity(name, ours, base[1], exact[1], 3)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n, v", [(1, 1), (3, 1), (3, 97), (4, 1000), (2, 50257), (1, 50304)])
def test_cross_entropy(kernels: Any, dtype: torch.dtype, n: int, v: int) -> None:
    torch.manual_seed(v)
    logits = (2 * torch.randn(n, v)).to(dtype)
    check_cross_entropy(kernels, logits, torch.randint(v, (n,)))
    options = dict(weight=torch.rand(v), label_smoothing=0.1, z_loss=1e-3, softcap=3.0, ignore_index=0)
    check_cross_entropy(kernels, logits, torch.arange(n) % v, offset=1, **options)


@pytest.mark.parametrize("dtype", FLOATS)
def test_cross_entropy_targets(kernels: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    logits = torch.randn(7, 130).to(dtype)
    target = torch.tensor([0, -100, 99, 100, -1, 1 << 40, 5])  # 100 and above: padding or nothing
    for options in ({}, dict(label_smoothing=0.2), dict(weight=torch.rand(100)), dict(z_loss=0.1), dict(softcap=2.0)):
        check_cross_entropy(kernels, logits, target, vocab_size=100, **options)
    check_cross_entropy(kernels, logits, torch.full((7,), -100))
    check_cross_entropy(kernels, logits, torch.tensor([3, 3, 1, 0, 2, 3, 99]), ignore_index=3)


@pytest.mark.parametrize("dtype", FLOATS)
def test_cross_entropy_layouts_and_extremes(kernels: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    base, target = torch.randn(5, 300).to(dtype), torch.randint(97, (5,))
    check_cross_entropy(kernels, base[:, 3:100], target, offset=5)
    check_cross_entropy(kernels, base[:1, :97].expand(5, 97), target)
    check_cross_entropy(kernels, (base[:, :97].float() * 1e4).to(dtype), target)
    check_cross_entropy(kernels, (base[:, :97].float() + 1e4).to(dtype), target)
    large = {torch.float32: 1e4, torch.bfloat16: 1e6, torch.float16: 6e4}[dtype]  # p from a rounded lse would show
    check_cross_entropy(kernels, (base[:, :2].float() + large).to(dtype), target % 2)
    masked = base[:, :97].clone()
    masked[:, 90:] = -math.inf
    check_cross_entropy(kernels, masked, target.clamp(max=89))
    confident = torch.zeros(5, 97, dtype=dtype).scatter_(1, target[:, None], 20.0)
    check_cross_entropy(kernels, confident, target)


@pytest.mark.parametrize("dtype", FLOATS)
def test_scale_rows(kernels: Any, dtype: torch.dtype) -> None:
    x = kernels.place(torch.randn(4, 203), offset=1).to(dtype)
    for scale in (torch.tensor([1.0, 0.0, -2.5, 1.0]), torch.tensor([0.5])):
        expected = (x.float() * scale[:, None]).to(dtype)
        kernels.scale_rows(x, scale)
        assert torch.equal(x, expected)


# ---- adamw ----

GROUPS = [(0.9, 0.95, 1e-8, 0.1), (0.8, 0.999, 1e-6, 0.0)]
LR = torch.tensor([1e-2, 3e-3])
SIZES = [1, 7, 4096, 33000, 0]


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> bf16 and int16 remainder."""
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def make_state(kernels: Any, mode: str, dtype: torch.dtype, moments: torch.dtype, offset: int) -> list[Any]:
    torch.manual_seed(3)
    state: list[Any] = []
    for size in SIZES:
        p = torch.randn(size)
        master = {"fp32": p.clone(), "remainder": split(p)[1]}.get(mode)
        param = split(p)[0] if mode == "remainder" else p.to(dtype)
        m, v = (0.1 * torch.randn(size)).to(moments), (0.01 * torch.rand(size)).to(moments)
        some = [param, torch.zeros_like(param), m, v, master]
        state.append(tuple(None if t is None else kernels.place(t, offset) for t in some))
    return state


def master_of(mode: str, t: tuple[Tensor, ...]) -> Tensor:
    if mode == "remainder":
        return ((t[0].view(torch.int16).to(torch.int32) << 16) + t[4].to(torch.int32)).view(torch.float32)
    return t[4] if mode == "fp32" else t[0]


def adamw_formula(p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, i: int, factor: Tensor) -> list[Tensor]:
    """p, m, v after step t in the inputs' dtype."""
    beta1, beta2, eps, decay = GROUPS[i]
    lr, g = float(LR[i]), g * factor.to(g.dtype)
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    p = p * (1 - lr * decay) - lr / (1 - beta1**t) * m / (v.sqrt() / (1 - beta2**t) ** 0.5 + eps)
    return [p, m, v]


MODES = [
    ("none", torch.float32, torch.float32),
    ("none", torch.bfloat16, torch.bfloat16),
    ("none", torch.float16, torch.float32),
    ("fp32", torch.bfloat16, torch.float32),
    ("fp32", torch.bfloat16, torch.bfloat16),
    ("fp32", torch.float16, torch.float32),
    ("remainder", torch.bfloat16, torch.float32),
    ("remainder", torch.bfloat16, torch.bfloat16),
]


@pytest.mark.parametrize("mode, dtype, moments", MODES)
@pytest.mark.parametrize("offset, wide_grads", [(0, False), (1, True)])
def test_adamw(
    kernels: Any, mode: str, dtype: torch.dtype, moments: torch.dtype, offset: int, wide_grads: bool
) -> None:
    state = make_state(kernels, mode, dtype, moments, offset)
    steps, scale, group = torch.full((5,), 4.0), torch.tensor([8.0]), [0, 1, 0, 1, 0]
    for t in range(5, 8):
        grads = [torch.randn(s).to(torch.float32 if wide_grads else dtype) for s in SIZES]
        before = [(master_of(mode, s).double(), s[2].double(), s[3].double()) for s in state]
        tensors = [(s[0], g, *s[2:]) for s, g in zip(state, grads, strict=True)]
        norm = kernels.adamw(tensors, steps, LR, GROUPS, group, max_norm=1.0, grad_scale=scale)
        exact_norm = torch.cat([g.double() for g in grads]).norm() / 8
        assert_parity("norm", norm[0], torch.cat([g.float() for g in grads]).norm() / 8, exact_norm, 2)
        factor = (1.0 / (exact_norm + 1e-6)).clamp(max=1) / 8
        for i, (s, g, old) in enumerate(zip(state, grads, before, strict=True)):
            exact = adamw_formula(old[0], g.double(), old[1], old[2], t, group[i], factor)
            base = adamw_formula(old[0].float(), g.float(), old[1].float(), old[2].float(), t, group[i], factor)
            for name, ours, b, e in zip("pmv", (master_of(mode, s), s[2], s[3]), base, exact, strict=True):
                if e.numel() > 0:
                    assert_parity(name, ours, b.to(ours.dtype), e, 2)
            if mode == "fp32":
                assert torch.equal(s[0], s[4].to(dtype))
    assert torch.equal(steps, torch.full((5,), 7.0))


def test_remainder_is_the_fp32_master_bit_by_bit(kernels: Any) -> None:
    found = []
    for mode in ("fp32", "remainder"):
        state = make_state(kernels, mode, torch.bfloat16, torch.float32, 0)
        steps = torch.zeros(5)
        for seed in range(3):
            torch.manual_seed(seed)
            tensors = [(s[0], torch.randn(s[0].shape).bfloat16(), *s[2:]) for s in state]
            kernels.adamw(tensors, steps, LR, GROUPS, max_norm=1.0)
        found.append([master_of(mode, s) for s in state])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_stochastic_rounding(kernels: Any) -> None:
    n = 65536
    p, g = torch.full((n,), 1.0, dtype=torch.bfloat16), torch.full((n,), 1.0)

    def one_step(seed: int) -> Tensor:
        param = p.clone()
        state = [torch.zeros(n), torch.zeros(n)]
        tensors, groups = [(param, g, *state, None)], [(0.9, 0.95, 1e-8, 0.0)]
        lr = torch.tensor([1e-3])
        kernels.adamw(tensors, torch.zeros(1), lr, groups, norm=False, stochastic=True, seed=seed)
        return param

    down = 1 - 2.0**-8  # bf16 neighbour below 1; the exact result is 1 - 1e-3
    first, second = one_step(1), one_step(2)
    assert set(first.unique().tolist()) == {down, 1.0} and torch.equal(first, one_step(1))
    for found in (first, second):
        expected = 1e-3 * 2**8 * n
        assert abs(float((found == down).sum()) - expected) < 6 * math.sqrt(expected)
    both = float(((first == down) & (second == down)).sum())
    assert abs(both - (1e-3 * 2**8) ** 2 * n) < 6 * math.sqrt((1e-3 * 2**8) ** 2 * n)


@pytest.mark.parametrize("fault", ["found_inf", "nan", "inf", None])
def test_adamw_skips(kernels: Any, fault: str | None) -> None:
    state = make_state(kernels, "fp32", torch.bfloat16, torch.float32, 0)
    grads = [torch.randn(s).bfloat16() for s in SIZES]
    if fault in ("nan", "inf"):
        grads[3][-1] = float(fault)
    before = [tuple(t.clone() for t in s) for s in state]
    steps, found = torch.full((5,), 2.0), torch.tensor([float(fault == "found_inf")])
    tensors = [(s[0], g, *s[2:]) for s, g in zip(state, grads, strict=True)]
    norm = kernels.adamw(tensors, steps, LR, GROUPS, max_norm=1.0, found_inf=found)
    assert bool(norm.isfinite()) == (fault not in ("nan", "inf"))
    assert torch.equal(steps, torch.full((5,), 2.0 if fault else 3.0))
    same = [
        torch.equal(a, b) for s, old in zip(state, before, strict=True) for a, b in zip(s, old, strict=True) if len(a)
    ]
    assert all(same) if fault else not any(same[i] for i in (0, 2, 3, 4))


def test_adamw_many_tensors_and_groups(kernels: Any) -> None:
    """Past what one launch holds: 512 tensors, 64 groups."""
    n = 700
    torch.manual_seed(4)
    p, g, m, v = torch.randn(n, 3), torch.randn(n, 3), torch.zeros(n, 3), torch.zeros(n, 3)
    groups = [(0.9, 0.95, 1e-8, i / 100) for i in range(100)]
    index = [i % 100 for i in range(n)]
    before, steps = p.clone(), torch.zeros(n)
    tensors = [(p[i], g[i], m[i], v[i], None) for i in range(n)]
    norm = kernels.adamw(tensors, steps, torch.full((100,), 0.1), groups, index, max_norm=0.0)
    assert float(norm[0]) == pytest.approx(float(g.norm()), rel=1e-6)
    assert bool((steps == 1).all())
    for_group = torch.tensor(index)[:, None]

    def after(p: Tensor, g: Tensor) -> Tensor:
        """The first step: both bias corrections cancel."""
        return p * (1 - 0.1 * for_group.to(p.dtype) / 100) - 0.1 * g / (g.abs() + 1e-8)

    assert_parity("p", p, after(before, g), after(before.double(), g.double()), 2)
