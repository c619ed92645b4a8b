"""The state of MuonAdamW: weights overwritten by the user, state cleared, copied or loaded, and groups that change."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from fastgpt.optim import MuonAdamW


def make(dtype: torch.dtype) -> tuple[list[nn.Parameter], MuonAdamW]:
    g = torch.Generator().manual_seed(0)
    ps = [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in ((7,), (4, 6), (6, 4))]
    return ps, MuonAdamW([{"params": ps[:1]}, {"params": ps[1:], "muon": True}], lr=1e-2, max_norm=1.0)


def walk(optimizer: MuonAdamW, ps: list[nn.Parameter], steps: range) -> None:
    for i in steps:
        g = torch.Generator().manual_seed(i)
        for p in ps:
            p.grad = torch.randn(p.shape, generator=g).to(p)
        optimizer.step()


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


def test_what_it_refuses() -> None:
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
