"""AdamW's Triton launchers called directly, against fp64: in the interpreter on CPU tensors, or on a GPU."""

from __future__ import annotations

import functools
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton or a kernel is imported

import pytest

pytest.importorskip("triton")

from launchers import CANARY, DEVICE, canaries_intact, guarded, randn, within
from torch import Tensor

from fastgpt.kernels import adamw
from fastgpt.parity import sensitivities

F32, BF16, F16, I16 = torch.float32, torch.bfloat16, torch.float16, torch.int16


class State:
    """Parameters of the given sizes with random values, and AdamW's state for them."""

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
        """Return the exact parameters: masters, or values assembled from both halves of the bits, or the parameters."""
        if self.masters and self.masters[0].dtype == I16:
            pairs = zip(self.params, self.masters, strict=True)
            return [((p.view(I16).int() << 16) + r.int()).view(F32) for p, r in pairs]
        return self.masters or self.params


SIZES, STEPS = (5, 4096, 9000, 1, 0), 3


def torch_adamw(*tensors: Tensor, group: list[int], dtype: torch.dtype, max_norm: float) -> list[Tensor]:
    """Take STEPS steps of torch.optim.AdamW. tensors: the parameters, then each step's gradients.

    Returns:
        the gradient norm of every step, then the parameters.
    """
    n = len(SIZES)
    params = [torch.nn.Parameter(v.to(dtype)) for v in tensors[:n]]
    sets = [{"params": [p for p, g in zip(params, group, strict=True) if g == i]} for i in range(2)]
    sets[0] |= {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    sets[1] |= {"lr": 3e-3, "betas": (0.8, 0.999), "eps": 1e-6, "weight_decay": 0.0}
    optimizer, norms = torch.optim.AdamW(sets, foreach=False), []
    for step in range(STEPS):
        for p, g in zip(params, tensors[n * (step + 1) : n * (step + 2)], strict=True):
            p.grad = g.to(dtype, copy=True)  # clipping works in place
        norms.append(torch.nn.utils.clip_grad_norm_(params, max_norm or float("inf")).reshape(1))
        optimizer.step()
    return [*norms, *(p.detach() for p in params)]


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
@pytest.mark.parametrize(
    "dtype,grad,master", [(F32, F32, None), (BF16, BF16, F32), (BF16, F32, I16), (F16, F16, F32)], ids=str
)
def test_adamw(dtype: torch.dtype, grad: torch.dtype, master: torch.dtype | None, max_norm: float) -> None:
    state = State(SIZES, dtype, master)
    grads = [[randn(n, seed=100 * step + i, dtype=grad) for i, n in enumerate(SIZES)] for step in range(STEPS)]
    inputs = [v.clone() for v in state.values] + [g for step in grads for g in step]
    reference = functools.partial(torch_adamw, group=state.group, max_norm=max_norm)
    exact, torchs = (reference(*inputs, dtype=d) for d in (torch.float64, F32))
    moved = sensitivities(functools.partial(reference, dtype=torch.float64), *inputs)
    scale = torch.tensor([4.0], device=DEVICE)
    for step in range(STEPS):
        state.step([g * 4 for g in grads[step]], max_norm, grad_scale=scale)
        within("norm", state.norm, torchs[step], exact[step], moved[step])
    assert state.steps.tolist() == [0, 0, 3, 3, 3, 3, 3] and canaries_intact(*state.buffers)
    for i, p in enumerate(state.fp32()):
        within(f"parameter {i}", p, torchs[STEPS + i], exact[STEPS + i], moved[STEPS + i])
        assert torch.equal(state.params[i], p.to(dtype)) or master == I16  # ties round up there
        assert i == 4 or (state.params[i].float() - p).abs().max() <= torch.finfo(dtype).eps * p.abs().max()


@pytest.mark.parametrize("moment", [F32, BF16], ids=str)
def test_adamw_small_moments_and_16_bit_parameters(moment: torch.dtype) -> None:
    state = State((3000,), BF16, None, moment)
    p, g = state.params[0].double(), randn(3000, seed=7, dtype=BF16)
    state.step([g], norm=False)
    m, v = 0.1 * g.double(), 0.05 * g.double() ** 2
    within("exp_avg", state.m[0], m.to(moment), m, 0.0)  # the baseline is one rounding: nothing more accurate exists
    within("exp_avg_sq", state.v[0], v.to(moment), v, 0.0)
    p = p * (1 - 1e-3) - 1e-2 * g.double() / (g.double().abs() + 1e-8)
    within("parameter", state.params[0], p.to(BF16), p, 0.0)
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
    exact = total.double().norm()
    within(
        "norm", partials[1:-1].sum().sqrt(), total.norm(), exact, *sensitivities(lambda t: [t.double().norm()], total)
    )
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
