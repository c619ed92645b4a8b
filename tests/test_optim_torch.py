"""fastgpt.optim.AdamW in torch.optim.AdamW's place: settings, groups, schedules, scaler, hooks, state both ways."""

from __future__ import annotations

import collections
import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from draws import generator
from torch import Tensor, nn
from torch.optim import lr_scheduler

from fastgpt import parity
from fastgpt.optim import AdamW

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ((9, 5), (7,), (3, 4))


# An optimizer and the dtype of its parameters: ours, the baseline, the exact one, and that one from initial values that
# moved by their rounding, whose distance to the exact one is the sensitivity of fastgpt/parity/rule.py.
WALKS: list[tuple[type[torch.optim.Optimizer], torch.dtype, int]] = [
    (AdamW, torch.float32, 0),
    (torch.optim.AdamW, torch.float32, 0),
    *((torch.optim.AdamW, torch.float64, shift) for shift in range(parity.SHIFTS + 1)),
]


def params(dtype: torch.dtype = torch.float32, shift: int = 0) -> list[nn.Parameter]:
    g = generator(0)
    values = [torch.randn(s, generator=g).to(DEVICE) for s in SHAPES]
    return [nn.Parameter((parity.moved(v, shift, i) if shift else v).to(dtype)) for i, v in enumerate(values)]


def grads_of(step: int) -> list[Tensor]:
    g = generator(100 + step)
    return [torch.randn(s, generator=g).to(DEVICE) for s in SHAPES]


def walk(optimizer: torch.optim.Optimizer, ps: list[nn.Parameter], steps: range, then: Any = None) -> None:
    """Steps with the gradients of these numbers; after each, `then`, a schedule's step."""
    for i in steps:
        for p, g in zip(ps, grads_of(i)):
            p.grad = g.to(p.dtype)
        optimizer.step()
        if then is not None:
            then()


def assert_parity(
    ours: list[nn.Parameter], theirs: list[nn.Parameter], exact: list[nn.Parameter], *moved: list[nn.Parameter]
) -> None:
    """Hold the parameters of WALKS' optimizers to the parity rule."""
    for a, truth, *others in zip(ours, exact, theirs, *moved):
        error, torch_error, *moves = (parity.largest_error(t, truth) for t in (a, *others))
        allowed = parity.allowed_error("p", truth, torch_error, torch.float32, max(moves))
        assert error <= allowed, (error, torch_error, moves)


def test_settings_are_torchs_in_its_order() -> None:
    stock = list(inspect.signature(torch.optim.AdamW).parameters.values())
    ours = list(inspect.signature(AdamW).parameters.values())
    assert [(p.name, p.kind, p.default) for p in ours[: len(stock)]] == [(p.name, p.kind, p.default) for p in stock]
    assert [p.name for p in ours[len(stock) :]] == ["master", "max_norm", "moment_dtype", "seed"]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(stock) :])
    group, theirs = AdamW(params()).param_groups[0], torch.optim.AdamW(params()).param_groups[0]
    assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}


@pytest.mark.parametrize(
    "flags", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"capturable": True}], ids=str
)
def test_flags_that_only_say_how_are_accepted(flags: dict[str, bool]) -> None:
    a, b = params(), params()
    walk(AdamW(a), a, range(3))
    walk(AdamW(b, **flags), b, range(3))  # type: ignore[arg-type]
    assert all(torch.equal(p, q) for p, q in zip(a, b))


@pytest.mark.parametrize("flag", ["amsgrad", "maximize", "differentiable"])
def test_flags_that_change_the_result_are_refused_by_name(flag: str) -> None:
    match = f"{flag}=True is not supported"
    with pytest.raises(ValueError, match=match):
        AdamW(params(), **{flag: True})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=match):
        AdamW([{"params": params(), flag: True}])
    saved = torch.optim.AdamW(params(), **{flag: True}).state_dict()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=match):
        AdamW(params()).load_state_dict(saved)


def test_wrong_settings_of_a_group_are_refused() -> None:
    p = params()
    for setting, match in (
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": "1e-3"}, "lr is '1e-3', expected a number"),
        ({"lr": torch.zeros(2)}, r"lr has shape \(2,\)"),
        ({"betas": (0.9, 1.0)}, "betas are"),
        ({"betas": (torch.tensor(0.9), 0.9)}, "betas are tensors"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
    ):
        for make in (lambda s: AdamW(p, **s), lambda s: AdamW([{"params": p, **s}])):
            with pytest.raises(ValueError, match=match):
                make(setting)
    with pytest.raises(ValueError, match="decoupled_weight_decay is False"):
        AdamW(p).load_state_dict(torch.optim.Adam(params(), weight_decay=0.1).state_dict())
    with pytest.raises(ValueError, match="a saved group has no betas, expected the state of an AdamW"):
        AdamW(p).load_state_dict(torch.optim.SGD(params(), lr=1.0).state_dict())
    others = torch.optim.Adamax(q := params(), weight_decay=0.0)
    walk(others, q, range(1))
    with pytest.raises(ValueError, match="saved state has .*'exp_inf'.* and no exp_avg_sq"):
        AdamW(p).load_state_dict(others.state_dict())
    for setting in ({"max_norm": float("nan")}, {"seed": 1.5}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            AdamW(p, **setting)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="bogus"):
        AdamW(p, bogus=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("ours_first", [True, False])
def test_state_continues_the_trajectory_both_ways(ours_first: bool) -> None:
    """Five steps with one, five with the other from its state_dict, through a file; beside torch's ten and fp64's."""
    options: dict[str, Any] = dict(lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9))
    first, second = (AdamW, torch.optim.AdamW) if ours_first else (torch.optim.AdamW, AdamW)
    mixed = params()
    before = first(mixed, **options)
    walk(before, mixed, range(5))
    buffer = io.BytesIO()
    torch.save(before.state_dict(), buffer)
    after = second(mixed, lr=7.0)  # groups' settings come with the state
    after.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    walk(after, mixed, range(5, 10))
    others = [params(dtype, shift) for _, dtype, shift in WALKS[1:]]
    for ps in others:
        walk(torch.optim.AdamW(ps, **options), ps, range(10))
    assert_parity(mixed, *others)
    assert [float(s["step"]) for s in after.state_dict()["state"].values()] == [10.0] * 3
    with pytest.raises(AssertionError):  # it can fail: one step less is another place
        assert_parity(params(), *others)


def test_loading_a_fresh_state_starts_again() -> None:
    a, b = params(), params()
    used, fresh = AdamW(a), AdamW(b)
    walk(used, a, range(3))
    with torch.no_grad():
        for p, q in zip(a, b):
            p.copy_(q)
    used.load_state_dict(fresh.state_dict())
    for optimizer, ps in ((used, a), (fresh, b)):
        walk(optimizer, ps, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(a, b)) and float(used.state[a[0]]["step"]) == 3


RESETS: dict[str, Callable[[torch.optim.Optimizer, list[nn.Parameter]], Any]] = {
    "clear": lambda o, ps: o.state.clear(),
    "replaced": lambda o, ps: setattr(o, "state", collections.defaultdict(dict)),
    "one of them": lambda o, ps: o.state.pop(ps[1]),
    "new tensors": lambda o, ps: o.state[ps[0]].update(
        step=torch.tensor(5.0), exp_avg=torch.ones_like(ps[0]), exp_avg_sq=torch.ones_like(ps[0])
    ),
    "a step": lambda o, ps: o.state[ps[0]].update(step=torch.tensor(5.0)),
    "its own state_dict": lambda o, ps: o.load_state_dict(o.state_dict()),
}


@pytest.mark.parametrize("name", RESETS)
def test_state_that_is_cleared_or_replaced(name: str) -> None:
    walks = []
    for kind, dtype, shift in WALKS:
        ps = params(dtype, shift)
        optimizer = kind(ps, lr=1e-2)
        walk(optimizer, ps, range(3))
        RESETS[name](optimizer, ps)
        walk(optimizer, ps, range(3, 6))
        walks.append(ps)
        steps = [float(optimizer.state[p]["step"]) for p in ps]
    assert_parity(*walks)
    expected = {"one of them": [6, 3, 6], "new tensors": [8, 6, 6], "a step": [8, 6, 6], "its own state_dict": [6] * 3}
    assert steps == expected.get(name, [3] * 3)


@pytest.mark.parametrize("lr", [torch.tensor([0.1]), torch.tensor([[0.1]]), np.float32(0.1), 1], ids=str)
def test_learning_rates_of_every_kind(lr: Any) -> None:
    walks = []
    for kind in (AdamW, torch.optim.AdamW):
        ps = params()
        optimizer = kind(ps, lr=copy.deepcopy(lr))
        walk(optimizer, ps, range(2))
        walks.append(ps)
    for p, q in zip(*walks):
        torch.testing.assert_close(p, q)


def test_groups_are_added_mid_run() -> None:
    walks = []
    for kind in (AdamW, torch.optim.AdamW):
        ps = params()
        optimizer = kind(ps[:1], lr=1e-2)
        walk(optimizer, ps, range(3))
        optimizer.add_param_group({"params": ps[1], "lr": 3e-2, "weight_decay": 0.5})
        walk(optimizer, ps, range(3, 5))
        optimizer.add_param_group({"params": [ps[2]]})
        walk(optimizer, ps, range(5, 8))
        assert [float(optimizer.state[p]["step"]) for p in ps] == [8, 5, 3]
        walks.append((ps, optimizer.state_dict()))
    for p, q in zip(walks[0][0], walks[1][0]):
        torch.testing.assert_close(p, q)
    again = AdamW(walks[0][0][:1])
    for p in walks[0][0][1:]:
        again.add_param_group({"params": [p]})
    again.load_state_dict(walks[1][1])
    assert float(again.state[walks[0][0][1]]["step"]) == 5


def test_a_refused_group_leaves_the_optimizer_as_it_was() -> None:
    a, b = params(), params()
    one, other = AdamW(a), AdamW(b)
    walk(one, a, range(2))
    walk(other, b, range(2))
    for bad in (torch.zeros(3, dtype=torch.complex64), torch.zeros(4, 6)[:, :3], torch.zeros(3, device="meta")):
        with pytest.raises((TypeError, ValueError), match="AdamW: (a )?parameter"):
            one.add_param_group({"params": [nn.Parameter(bad)]})
    assert len(one.param_groups) == 1
    for optimizer, ps in ((one, a), (other, b)):
        walk(optimizer, ps, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(a, b))


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, [lambda i: 0.5**i, lambda i: 1 / (i + 1)]),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 6, 1e-4),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=9),  # betas too
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, step_size_up=2),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.5)], [3]
    ),
}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_drive_it_as_they_drive_torchs(name: str, tensor_lr: bool) -> None:
    walks, settings = [], []
    for kind, dtype, shift in WALKS:
        ps = params(dtype, shift)
        lr: Any = torch.tensor(1e-2, device=DEVICE) if tensor_lr else 1e-2
        flags = {} if kind is AdamW else {"capturable": False, "foreach": False}
        optimizer = kind([{"params": ps[:1]}, {"params": ps[1:], "weight_decay": 0.3}], lr=lr, **flags)
        schedule = SCHEDULES[name](optimizer)
        walk(optimizer, ps, range(8), schedule.step)
        walks.append(ps)
        settings.append([(float(g["lr"]), g["betas"]) for g in optimizer.param_groups])
    assert settings[0] == settings[1] and settings[0][0] != (1e-2, (0.9, 0.999))
    assert_parity(*walks)


def test_grad_scaler_skips_and_unscales() -> None:
    """torch.amp.GradScaler with unscaling in the step, unscaling before it, and a gradient that overflows."""
    results = []
    for kind in (AdamW, torch.optim.AdamW):
        ps = params()
        optimizer, scaler = kind(ps, lr=1e-2), torch.amp.GradScaler(DEVICE, init_scale=64.0)
        for i in range(4):
            loss = sum((p * g).sum() for p, g in zip(ps, grads_of(i)))
            scaler.scale(loss * (torch.inf if i == 2 else 1.0)).backward()  # type: ignore[arg-type]
            if i == 1:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(ps, 0.1)
            before = [p.detach().clone() for p in ps]
            scaler.step(optimizer)
            assert all(torch.equal(p, q) for p, q in zip(ps, before)) == (i == 2)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() == 32.0 and float(optimizer.state[ps[0]]["step"]) == 3
        results.append(ps)
    for p, q in zip(*results):
        torch.testing.assert_close(p, q)


def test_closure_zero_grad_and_named_parameters() -> None:
    ps = params()
    optimizer = AdamW([(f"p{i}", p) for i, p in enumerate(ps)], lr=1e-2)
    assert optimizer.param_groups[0]["param_names"] == ["p0", "p1", "p2"]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack([p.square().sum() for p in ps[:2]]).sum()
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first and first.requires_grad and ps[2].grad is None and ps[2] not in optimizer.state
    optimizer.zero_grad(set_to_none=False)
    assert ps[0].grad is not None and not ps[0].grad.any()
    optimizer.zero_grad()
    assert all(p.grad is None for p in ps)


def test_hooks_are_called_and_see_the_state() -> None:
    ps = params()
    optimizer, seen = AdamW(ps), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    walk(optimizer, ps, range(1))
    assert seen == ["before", "after"]
    saved = optimizer.state_dict()

    def double(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        first = {**state["state"][0], "exp_avg": 2 * state["state"][0]["exp_avg"]}
        return {**state, "state": {**state["state"], 0: first}}

    other = AdamW(qs := params())
    other.register_load_state_dict_pre_hook(double)
    other.register_load_state_dict_post_hook(lambda o: seen.append(float(o.state[qs[0]]["step"])))
    for _ in range(2):
        other.load_state_dict(saved)
        assert torch.equal(other.state[qs[0]]["exp_avg"], 2 * saved["state"][0]["exp_avg"])
    assert seen[2:] == [1.0, 1.0]


@pytest.mark.parametrize("dtype, master", [(torch.float32, "fp32"), (torch.bfloat16, "remainder")])
def test_copies_go_on_alone(dtype: torch.dtype, master: str) -> None:
    """deepcopy, pickle and torch.save of the parameters with their optimizer: the same bits from there on, apart."""
    ps = params(dtype)
    optimizer = AdamW(ps, lr=1e-2, max_norm=0.5, master=master)
    walk(optimizer, ps, range(3))
    buffer = io.BytesIO()
    torch.save((ps, optimizer), buffer)
    copies = [
        copy.deepcopy((ps, optimizer)),
        pickle.loads(pickle.dumps((ps, optimizer))),
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=False),
    ]
    walk(optimizer, ps, range(3, 6))
    for qs, twin in copies:
        assert float(twin.state[qs[0]]["step"]) == 3 and twin.max_norm == 0.5 and twin.master == master
        walk(twin, qs, range(3, 6))
        assert all(torch.equal(p, q) for p, q in zip(ps, qs)) and torch.equal(twin.grad_norm, optimizer.grad_norm)
        assert float(twin.state[qs[0]]["step"]) == 6


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 3, sparse=True, device=DEVICE)
    optimizer = AdamW(table.parameters())
    table(torch.tensor([1, 2], device=DEVICE)).sum().backward()
    with pytest.raises(TypeError, match="a gradient is torch.sparse_coo, expected dense"):
        optimizer.step()
