"""fastgpt.optim.AdamW beyond parity: state, precision of 16-bit parameters, skipping, scaler protocol."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgpt import parity
from fastgpt.ops import use
from fastgpt.ops.adamw import join_remainder, split_remainder
from fastgpt.optim import AdamW

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = [*parity.backends_here("adamw"), "torch"]
ON = pytest.mark.parametrize("name", NAMES)


def params(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=g).to(DEVICE, dtype)) for s in ((9, 5), (7,))]


def give_grads(ps: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in ps:
        p.grad = (torch.randn(p.shape, generator=g) * scale).to(DEVICE, p.dtype)


@ON
def test_a_norm_that_is_not_finite_skips_the_step(name: str) -> None:
    ps = params()
    with use(strict=True, adamw=name):
        opt = AdamW(ps, max_norm=1.0)
        give_grads(ps, 1)
        opt.step()
        before = copy.deepcopy([ps, opt.state_dict()["state"]])
        give_grads(ps, 2)
        ps[1].grad[3] = torch.inf  # type: ignore[index]
        opt.step()
        assert not torch.isfinite(opt.grad_norm)
        assert all(torch.equal(a, b) for a, b in zip(ps, before[0]))
        for i, state in opt.state_dict()["state"].items():
            assert all(torch.equal(state[k], before[1][i][k]) for k in state), "moments and step counters stay"
        give_grads(ps, 3)
        opt.step()
        assert float(opt.state[ps[0]]["step"]) == 2 and torch.isfinite(opt.grad_norm)


@ON
def test_found_inf_and_grad_scale(name: str) -> None:
    """The protocol of torch.amp.GradScaler: gradients divided on the device, found_inf skips."""
    results = []
    with use(strict=True, adamw=name):
        for scale in (1.0, 64.0):
            ps = params()
            opt = AdamW(ps, max_norm=0.1)
            give_grads(ps, 1, scale)
            opt.grad_scale = torch.full((1,), scale, device=DEVICE)  # type: ignore[attr-defined]
            opt.found_inf = torch.zeros(1, device=DEVICE)  # type: ignore[attr-defined]
            opt.step()
            results.append(([p.detach().clone() for p in ps], opt.grad_norm.clone()))
            opt.found_inf.fill_(1.0)  # type: ignore[attr-defined]
            opt.step()
            assert all(torch.equal(p, q) for p, q in zip(ps, results[-1][0]))
            assert float(opt.state[ps[0]]["step"]) == 1
    torch.testing.assert_close(results[0], results[1])


@ON
def test_state_dict_round_trip_is_bitwise(name: str) -> None:
    for dtype, master in ((torch.float32, "fp32"), (torch.bfloat16, "fp32"), (torch.bfloat16, "remainder")):
        with use(strict=True, adamw=name):
            a = params(dtype)
            opt = AdamW(a, max_norm=1.0, master=master)
            for i in range(3):
                give_grads(a, i)
                opt.step()
            b = [nn.Parameter(p.detach().clone()) for p in a]
            again = AdamW(b, max_norm=1.0, master=master)
            again.load_state_dict(copy.deepcopy(opt.state_dict()))
            for ps, o in ((a, opt), (b, again)):
                give_grads(ps, 7)
                o.step()
            assert all(torch.equal(p, q) for p, q in zip(a, b))
            assert float(again.state[b[1]]["step"]) == 4


def test_state_of_torch_adamw_loads_and_back() -> None:
    a = params()
    theirs = torch.optim.AdamW(a)
    give_grads(a, 0)
    theirs.step()
    b = [nn.Parameter(p.detach().clone()) for p in a]
    ours = AdamW(b)
    ours.load_state_dict(theirs.state_dict())
    for ps, o in ((a, theirs), (b, ours)):
        give_grads(ps, 5)
        o.step()
    for p, q in zip(a, b):
        torch.testing.assert_close(p, q)
    theirs.load_state_dict(ours.state_dict())


@ON
def test_parameters_without_a_gradient_stay_and_keep_their_step(name: str) -> None:
    ps = params()
    with use(strict=True, adamw=name):
        opt = AdamW(ps, max_norm=1.0)
        for i in range(3):
            give_grads(ps, i)
            if i == 1:
                ps[0].grad = None
            before = ps[0].detach().clone()
            opt.step()
            assert torch.equal(ps[0], before) == (i == 1)
    assert [float(opt.state[p]["step"]) for p in ps] == [2, 3]


@ON
def test_norm_forgets_gradients_that_are_gone(name: str) -> None:
    """A step over fewer and smaller tensors must not clip by norms left over from the larger set."""
    big, small = nn.Parameter(torch.zeros(1 << 17, device=DEVICE)), nn.Parameter(torch.zeros(3, device=DEVICE))
    with use(strict=True, adamw=name):
        opt = AdamW([big, small], max_norm=1.0)
        big.grad, small.grad = torch.ones_like(big), torch.ones_like(small)
        opt.step()
        big.grad = None
        opt.step()
    assert float(opt.grad_norm) == pytest.approx(3**0.5)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "triton"])  # the interpreter would take minutes
def test_norm_of_a_large_gradient_is_exact(name: str) -> None:
    """PyTorch's norm on a CPU is off by 0.3 % at 40 million elements."""
    p = nn.Parameter(torch.zeros(1 << 23, device=DEVICE))
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 1e-4
    with use(strict=True, adamw=name):
        opt = AdamW([p], max_norm=1.0)
        opt.step()
    assert float(opt.grad_norm) == pytest.approx(float(p.grad.double().norm()), rel=1e-6)


@ON
def test_nan_reaches_the_parameters_without_clipping(name: str) -> None:
    """Nothing skips without max_norm: a NaN gradient must show in the parameter, whatever keeps its low bits."""
    with use(strict=True, adamw=name):
        for dtype, master in ((torch.float32, "fp32"), (torch.bfloat16, "fp32"), (torch.bfloat16, "remainder")):
            p = nn.Parameter(torch.ones(5, device=DEVICE, dtype=dtype))
            opt = AdamW([p], master=master)
            p.grad = torch.ones_like(p)
            p.grad.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)[2] = 0x7FFF  # all mantissa bits set
            if dtype == torch.float32:
                p.grad[2] = torch.nan
            opt.step()
            assert p.isnan().tolist() == [False, False, True, False, False], (dtype, master)


@ON
def test_tensor_learning_rate_and_groups(name: str) -> None:
    results = []
    with use(strict=True, adamw=name):
        for lr in (3e-3, torch.tensor(3e-3, device=DEVICE)):
            ps = params()
            opt = AdamW([{"params": ps[:1], "lr": lr, "weight_decay": 0.5}, {"params": ps[1:], "lr": 1e-2}])
            for i in range(3):
                give_grads(ps, i)
                opt.step()
                lr_now = opt.param_groups[0]["lr"]
                if isinstance(lr_now, Tensor):
                    lr_now.mul_(0.5)  # in place, as a schedule inside a CUDA graph does
                else:
                    opt.param_groups[0]["lr"] = lr_now * 0.5
            results.append([p.detach().clone() for p in ps])
    torch.testing.assert_close(results[0], results[1])


@ON
def test_remainder_is_exactly_the_fp32_master(name: str) -> None:
    """bf16 parameters with 16-bit remainders take exactly the values of fp32 masters."""
    walks: dict[str, list[Tensor]] = {}
    with use(strict=True, adamw=name):
        for master in ("fp32", "remainder"):
            ps = params(torch.bfloat16)
            opt = AdamW(ps, master=master, max_norm=1.0)
            for i in range(10):
                give_grads(ps, i)
                opt.step()
            states = [opt.state[p]["master"] for p in ps]
            walks[master] = [m if m.dtype == torch.float32 else join_remainder(p, m) for p, m in zip(ps, states)]
    assert all(torch.equal(a, b) for a, b in zip(walks["fp32"], walks["remainder"]))


def test_split_and_join_are_inverse() -> None:
    x = torch.cat((torch.randn(1000), torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3.0e38, 1.00390625, -1.00390625])))
    param, remainder = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x, dtype=torch.int16)
    split_remainder(x, param, remainder)
    assert torch.equal(join_remainder(param, remainder).view(torch.int32), x.view(torch.int32))
    assert ((param.float() - x).abs() <= x.abs() * 2**-8 + 1e-40).all()


@ON
def test_stochastic_rounding_is_unbiased_and_repeatable(name: str) -> None:
    """Of parameters a third of the way between two bf16 values, a third must round up, and again with the same seed."""
    low, step = 1.0, 2.0**-7
    n = 1 << 15
    rounds = []
    with use(strict=True, adamw=name):
        for seed in (0, 0, 1):
            p = nn.Parameter(torch.full((n,), low, dtype=torch.bfloat16, device=DEVICE))
            # the first step of Adam moves by lr * sign(g): to 1 + step / 3
            opt = AdamW([p], lr=step / 3, weight_decay=0.0, eps=0.0, master="stochastic", seed=seed)
            p.grad = torch.full_like(p, -1.0)
            opt.step()
            assert set(p.float().unique().tolist()) == {low, low + step}
            rounds.append(p.detach().float())
    assert torch.equal(rounds[0], rounds[1]) and not torch.equal(rounds[0], rounds[2])
    share = float((rounds[0] > low).float().mean())
    sigma = (2 / 9 / n) ** 0.5
    assert abs(share - 1 / 3) < 5 * sigma


@ON
def test_small_updates_survive_16_bits(name: str) -> None:
    """Updates under half a unit in the last place are lost without a master and kept with one."""
    moved = {}
    with use(strict=True, adamw=name):
        for master in (None, "fp32", "remainder"):
            p = nn.Parameter(torch.ones(64, dtype=torch.bfloat16, device=DEVICE))
            opt = AdamW([p], lr=4e-4, weight_decay=0.0, master=master)
            for _ in range(25):
                p.grad = torch.ones_like(p)
                opt.step()
            moved[master] = float((1 - p.float()).mean())
    assert moved[None] == 0 and moved["fp32"] == moved["remainder"] == pytest.approx(0.01, abs=0.004)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "triton"])  # the interpreter would take minutes
def test_a_thousand_steps_follow_fp64(name: str) -> None:
    def walk(dtype: torch.dtype, kind: Any) -> Tensor:
        g = torch.Generator().manual_seed(3)
        p = nn.Parameter(torch.randn(40, generator=g).to(DEVICE, dtype))
        opt = kind([p], lr=1e-2)
        for _ in range(1000):
            p.grad = (2 * p.detach() + 0.5 * torch.randn(40, generator=g).to(DEVICE, dtype)).detach()
            opt.step()
        return p.detach().double()

    with use(strict=True, adamw=name):
        ours = walk(torch.float32, AdamW)
    theirs, exact = walk(torch.float32, torch.optim.AdamW), walk(torch.float64, torch.optim.AdamW)
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + 1e-6 * exact.norm()


@ON
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_that_are_set_stay_set(name: str, dtype: torch.dtype) -> None:
    """Half of a tensor is overwritten between two steps: there the master follows, elsewhere not a bit differs."""
    walks = []
    with use(strict=True, adamw=name):
        for by_hand in (False, True):
            ps = params(dtype)
            opt = AdamW(ps, lr=1e-3)
            for i in range(3):
                give_grads(ps, i)
                opt.step()
                if i == 1:
                    for p in ps:
                        new = p.detach() + (torch.arange(p.numel(), device=DEVICE) % 2).view(p.shape)
                        if by_hand:
                            opt.state[p]["master"][new != p] = new[new != p].float()
                        p.data.copy_(new)
            walks.append([t for p in ps for t in (p.detach(), opt.state[p]["master"])])
    assert all(torch.equal(a, b) for a, b in zip(*walks))


@ON
def test_remainders_beside_weights_that_are_set(name: str) -> None:
    """The old value leaves at most half a unit in the last place, at zero too, where it could become a NaN."""
    with use(strict=True, adamw=name):
        p = params(torch.bfloat16)[0]
        opt = AdamW([p], lr=0.0, master="remainder")
        for low in (-0x8000, 0x7FFF):
            for value in (0.0, -0.0, 1.0, -3.0):
                give_grads([p], 0)
                opt.step()
                p.data.fill_(value)
                opt.state[p]["master"].fill_(low)
                opt.step()
                assert float((p - value).detach().abs().max()) <= abs(value) * 2**-7, (low, value)


@ON
def test_torchs_defaults_change_nothing(name: str) -> None:
    walks = []
    for dtype, device in ((torch.float32, DEVICE), (torch.bfloat16, "meta"), (torch.float64, "meta")):
        ps = params()
        grads = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p) for p in ps]
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device), use(strict=True, adamw=name):
                opt = AdamW(ps, lr=1e-2, max_norm=1.0)
                for _ in range(3):
                    for p, g in zip(ps, grads):
                        p.grad = g
                    opt.step()
        finally:
            torch.set_default_dtype(torch.float32)
        walks.append([*ps, opt.grad_norm])
    assert all(torch.equal(a, b) for walk in walks[1:] for a, b in zip(walks[0], walk))


def test_fp64_beside_fp32() -> None:
    walks = []
    for kind in (AdamW, torch.optim.AdamW):
        ps = [params()[0], params(torch.float64)[1]]
        opt = kind(ps, lr=2**-7)
        for i in range(3):
            give_grads(ps, i)
            opt.step()
        walks.append(ps)
    for p, q in zip(*walks):
        torch.testing.assert_close(p, q)


KINDS = ("fp32", "remainder", "stochastic", None)


@pytest.mark.parametrize("weights_first", [True, False])
@pytest.mark.parametrize("first", KINDS)
def test_state_with_another_kind_of_master_goes_on_where_it_was(first: str | None, weights_first: bool) -> None:
    """fp32 and remainder keep the fp32 value (half-way cases move by its last bit), all other kinds keep the weight."""

    def exact(p: Tensor, state: dict[str, Tensor]) -> Tensor:
        m = state.get("master", p.detach().float())
        return join_remainder(p.detach(), m) if m.dtype == torch.int16 else m

    for then in KINDS:
        p = nn.Parameter(torch.cat((torch.linspace(-1, 1, 61), torch.tensor([1.0, 1.0078125, -2.0]))).bfloat16())
        opt = AdamW([p], lr=1e-3, weight_decay=0.0, master=first)
        p.grad = torch.cat((torch.ones(61), torch.zeros(3))).bfloat16()
        opt.step()
        if first == "fp32":  # three values half-way between two bf16 values, rounded to even
            opt.state[p]["master"][61:] = torch.tensor([1.00390625, 1.01171875, -2.0078125])
            p.data.copy_(opt.state[p]["master"])
        elif first == "remainder":
            opt.state[p]["master"][61:] = -0x8000
        q = nn.Parameter(p.detach().clone() if weights_first else torch.full_like(p, 7.0))
        again = AdamW([q], lr=1e-3, master=then)
        again.load_state_dict(opt.state_dict())
        q.data.copy_(p)
        q.grad = torch.zeros_like(q)
        again.param_groups[0]["lr"] = 0.0
        again.step()
        kept = {first, then} <= {"fp32", "remainder"} and (weights_first or first == "fp32" or first == then)
        before, after = exact(p, opt.state[p]) if kept else p.detach().float(), exact(q, again.state[q])
        assert float(((after - before) / before).abs().max()) <= 2**-23, (first, then)
        assert torch.equal(after[:61], before[:61]) and (first == "remainder" or torch.equal(p, q)), (first, then)


def test_parameters_that_are_cast_exchanged_or_regrouped() -> None:
    """The state is converted at the next step, or one sentence says what is wrong."""
    ps = params()
    opt = AdamW([{"params": ps[:1]}, {"params": ps[1:]}], lr=1e-2)
    give_grads(ps, 0)
    opt.step()
    for p in ps:  # as model.half() does
        p.data = p.data.half()
    give_grads(ps, 1)
    opt.step()
    assert all(torch.equal(opt.state[p]["master"].half(), p) and float(opt.state[p]["step"]) == 2 for p in ps)
    for p in ps:
        p.data = p.data.t().contiguous().t().float()
    opt.state[ps[0]]["exp_avg"] = opt.state[ps[0]]["exp_avg"].bfloat16()
    give_grads(ps, 2)
    opt.step()
    assert "master" not in opt.state[ps[0]] and opt.state[ps[0]]["exp_avg"].dtype == torch.float32
    opt.param_groups[0]["params"][0] = fresh = params()[0]
    give_grads([fresh, ps[1]], 3)
    opt.step()
    assert float(opt.state[fresh]["step"]) == 1 and float(opt.state[ps[1]]["step"]) == 4
    del opt.param_groups[0]
    give_grads(ps, 4)
    opt.step()
    assert float(opt.state[ps[1]]["step"]) == 5
    ps[1].grad = None
    ps[1].data = torch.ones(4, device=DEVICE)
    give_grads(ps, 5)
    with pytest.raises(ValueError, match=r"state exp_avg has shape \(7,\), expected \(4,\)"):
        opt.step()
    opt.state.clear()
    opt.step()
    assert float(opt.state[ps[1]]["step"]) == 1


def test_refuses_what_it_cannot_do() -> None:
    p = params()
    with pytest.raises(ValueError, match="one device"):
        AdamW([p[0], nn.Parameter(torch.empty(3, device="meta"))])
    with pytest.raises(TypeError, match="expected dense floating point"):
        AdamW([nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
    for apart in (torch.zeros(4, 6)[:, :3], torch.zeros(3, 8)[:, ::2], torch.zeros(1, 3).expand(4, 3)):
        with pytest.raises(ValueError, match="without gaps or overlaps"):
            AdamW([nn.Parameter(apart)])
    AdamW([nn.Parameter(torch.zeros(2, 3, 4).permute(1, 2, 0)), nn.Parameter(torch.zeros(0, 3)[:, :2])])
    with pytest.raises(ValueError, match="for bf16 parameters"):
        AdamW([nn.Parameter(torch.zeros(3, dtype=torch.float16))], master="remainder")
    saved = AdamW(p)
    give_grads(p, 0)
    saved.step()
    state = saved.state_dict()
    state["state"][0]["exp_avg"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"saved exp_avg has shape \(2,\)"):
        AdamW(params()).load_state_dict(state)
