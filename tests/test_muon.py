"""MuonAdamW: its update, steps that are skipped on the device, and its state when weights are overwritten by the user,
state is cleared, copied or loaded, and groups change."""

from __future__ import annotations

import copy
import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt.optim import MuonAdamW, spread


def make(dtype: torch.dtype, **options: Any) -> tuple[list[nn.Parameter], MuonAdamW]:
    g = torch.Generator().manual_seed(0)
    ps = [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in ((7,), (4, 6), (6, 4))]
    return ps, MuonAdamW(
        [{"params": ps[:1]}, {"params": ps[1:], "muon": True}], lr=1e-2, **{"max_norm": 1.0, **options}
    )


def walk(optimizer: MuonAdamW, ps: list[nn.Parameter], steps: range) -> None:
    for i in steps:
        g = torch.Generator().manual_seed(i)
        for p in ps:
            p.grad = torch.randn(p.shape, generator=g).to(p)
        optimizer.step()


def tensors(ps: list[nn.Parameter], optimizer: MuonAdamW) -> list[Tensor]:
    """Return copies of the parameters and of all state."""
    state = [t for p in ps for _, t in sorted(optimizer.state[p].items())]
    return [t.detach().clone() for t in [*ps, *state]]


def test_the_update_is_torchs() -> None:
    """In bf16 two iterations of the same values differ by up to a hundredth."""
    ps, optimizer = make(torch.float32, max_norm=None, precision=torch.bfloat16)
    qs, _ = make(torch.float32)
    lr, rest = 1e-2, {"weight_decay": 0.1}
    others = torch.optim.Muon(qs[1:], lr, **rest, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(qs[:1], lr, **rest)
    start = [p.detach().clone() for p in ps]
    for i in range(3):
        walk(optimizer, ps, range(i, i + 1))
        for p, q in zip(ps, qs):
            q.grad = p.grad.clone()  # type: ignore[union-attr]
        for other in others:
            other.step()
    torch.testing.assert_close(ps[0], qs[0])
    for p, q, s in zip(ps[1:], qs[1:], start[1:]):
        assert float((p - q).detach().norm()) < 0.02 * float((p - s).detach().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clipping_is_that_of_clipped_gradients_which_stay(dtype: torch.dtype) -> None:
    (ps, optimizer), (qs, other) = make(dtype, max_norm=0.5), make(dtype, max_norm=None)
    for i in range(2):
        walk(optimizer, ps, range(i, i + 1))
        grads = [p.grad for p in ps if p.grad is not None]
        norm = torch.cat([g.double().flatten() for g in grads]).norm()
        assert float(norm) > 1.0 and math.isclose(float(optimizer.grad_norm), float(norm), rel_tol=1e-6)
        for q, g in zip(qs, grads):
            q.grad = (g.float() * (0.5 / norm.float())).to(g)
        other.step()
    for p, q in zip(ps, qs):
        torch.testing.assert_close(p, q, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
    (ps, optimizer), (qs, other) = make(dtype, max_norm=1e3), make(dtype, max_norm=None)
    for o, given in ((optimizer, ps), (other, qs)):
        walk(o, given, range(2))
    assert all(torch.equal(p, q) for p, q in zip(ps, qs)), "a norm below max_norm changes nothing"


@pytest.mark.parametrize("where", ["matrix", "vector", "found_inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_that_is_skipped_changes_nothing(dtype: torch.dtype, where: str) -> None:
    ps, optimizer = make(dtype)
    walk(optimizer, ps, range(2))
    before = tensors(ps, optimizer)
    for p in ps:
        p.grad = torch.ones_like(p)
    if where == "found_inf":
        optimizer.found_inf = torch.ones(1)
    else:
        grad = ps[1 if where == "matrix" else 0].grad
        assert grad is not None
        grad.view(-1)[2] = math.nan if dtype == torch.float32 else math.inf
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(ps, optimizer), strict=True))
    optimizer.found_inf = None
    qs, other = make(dtype)
    walk(other, qs, range(2))
    walk(optimizer, ps, range(2, 3))
    walk(other, qs, range(2, 3))
    assert all(torch.equal(a, b) for a, b in zip(tensors(ps, optimizer), tensors(qs, other), strict=True))


class NoWaiting(TorchDispatchMode):
    """Raises where the host would read a tensor: item(), bool(), float(), nonzero(), a mask as an index."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim"):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_never_waits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(*args: Any) -> None:
        raise AssertionError("the host reads a tensor")

    ps, optimizer = make(dtype)
    walk(optimizer, ps, range(1))
    optimizer.found_inf = torch.zeros(1)
    monkeypatch.setattr(Tensor, "tolist", waits)
    monkeypatch.setattr(Tensor, "numpy", waits)
    before = ps[1].detach().clone()
    with NoWaiting():
        with pytest.raises(AssertionError, match="waits for the device"):
            bool(torch.ones(1))
        optimizer.param_groups[0]["lr"] = 3e-3
        optimizer.step()
        optimizer.state.clear()
        optimizer.step()
    assert not torch.equal(before, ps[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies_and_loaded_states_go_on_alone(dtype: torch.dtype) -> None:
    ps, optimizer = make(dtype)
    walk(optimizer, ps, range(2))
    twins: list[Any] = [copy.deepcopy((ps, optimizer)), pickle.loads(pickle.dumps((ps, optimizer)))]
    others, loaded = make(dtype)
    for p, q in zip(ps, others):
        q.data.copy_(p)
    loaded.param_groups[0]["lr"] = 7.0  # groups' settings are part of the state
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    walk(optimizer, ps, range(2, 4))
    for qs, twin in [*twins, (others, loaded)]:
        walk(twin, qs, range(2, 4))
        assert all(torch.equal(p, q) for p, q in zip(ps, qs)) and float(twin.state[qs[0]]["step"]) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_are_set_and_state_that_is_cleared(dtype: torch.dtype) -> None:
    """The steps that follow equal those of a new optimizer."""
    ps, optimizer = make(dtype)
    qs, fresh = make(dtype)
    walk(optimizer, ps, range(2))
    for p, q in zip(ps, qs):
        p.data.copy_(q)
    optimizer.state.clear()
    for ps_, o in ((ps, optimizer), (qs, fresh)):
        walk(o, ps_, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(ps, qs))
    before = ps[1].detach().clone() + 1
    ps[1].data.copy_(before)  # the state is kept
    walk(optimizer, ps, range(4, 5))
    assert 0 < float((ps[1] - before).detach().abs().max()) < 0.1


def test_the_work_is_spread_by_size() -> None:
    shapes = 12 * [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    assert spread.owners([(2, 2), (9, 2), (3, 3), (2, 2)], 2) == [[1], [2, 0, 3]]
    for world in (1, 2, 5, 60):
        found = spread.owners(shapes, world)
        assert sorted(i for mine in found for i in mine) == list(range(48)) and len(found) == world
        work = [sum(max(shapes[i]) for i in mine) for mine in found]  # as min(shape) is 768 in all
        assert max(work) - min(work) <= 3072


def test_a_placement_that_it_cannot_gather() -> None:
    from torch.distributed.tensor import Replicate, Shard

    for placements in ((Shard(1),), (Replicate(),), (Replicate(), Shard(0))):
        with pytest.raises(ValueError, match="expected rows sharded over one mesh dimension"):
            spread.group_of_rows(SimpleNamespace(placements=placements))


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"a parameter has shape \(3,\), expected a matrix"):
        MuonAdamW([{"params": [nn.Parameter(torch.ones(3))], "muon": True}], lr=1e-2)
    with pytest.raises(ValueError, match="momentum is -0.5, expected at least 0"):
        make(torch.float32, momentum=-0.5)
    ps, optimizer = make(torch.float32)
    walk(optimizer, ps, range(1))
    with pytest.raises(ValueError, match="got a new group after construction"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    saved = torch.optim.AdamW([{"params": ps[1:]}, {"params": ps[:1]}]).state_dict()
    with pytest.raises(ValueError, match="the saved groups are not those of this optimizer"):
        optimizer.load_state_dict(saved)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["momentum_buffer"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"a momentum_buffer of shape \(3,\), expected a momentum_buffer of \(4, 6\)"):
        optimizer.load_state_dict(saved)
    for p in ps:
        p.data = p.data.bfloat16()
    with pytest.raises(ValueError, match="a matrix became torch.bfloat16"):
        walk(optimizer, ps, range(1, 2))
