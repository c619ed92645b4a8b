"""fastgpt.optim.AdamW beside its parity: state, precision of 16-bit parameters, skipping, scaler protocol."""

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
    """torch.amp.GradScaler's protocol: gradients divided on the device, found_inf skips."""
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
    """A step over fewer and smaller tensors must not clip by what the larger set left behind."""
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
    """PyTorch's own on a CPU is 0.3 % off at 40 million elements."""
    p = nn.Parameter(torch.zeros(1 << 23, device=DEVICE))
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 1e-4
    with use(strict=True, adamw=name):
        opt = AdamW([p], max_norm=1.0)
        opt.step()
    assert float(opt.grad_norm) == pytest.approx(float(p.grad.double().norm()), rel=1e-6)


@ON
def test_nan_reaches_the_parameters_without_clipping(name: str) -> None:
    """Nothing skips without max_norm: a NaN gradient must be seen in the parameter, whatever keeps its low bits."""
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
    """bf16 parameters with 16-bit remainders walk the very path that fp32 masters walk."""
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
    """Parameters a third of the way between two bf16 values: a third must round up, and again for the same seed."""
    low, step = 1.0, 2.0**-7
    n = 1 << 15
    rounds = []
    with use(strict=True, adamw=name):
        for seed in (0, 0, 1):
            p = nn.Parameter(torch.full((n,), low, dtype=torch.bfloat16, device=DEVICE))
            # first step of Adam moves by lr * sign(g): to 1 + step / 3
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
    """Updates under half a unit in the last place: lost without a master, kept with one."""
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
