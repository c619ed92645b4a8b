"""linear_qkv: the kernel against a layer and a split, kept gradients, compile, tiles at every edge."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from contract import DEVICE, among_nans, rand
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import nn, ops, parity
from fastgpt.core.backend import use
from fastgpt.ops.linear_qkv import LINEAR_QKV_BWD, linear_qkv_torch

ON = pytest.mark.parametrize("name", parity.backends_here("linear_qkv"))


def arguments(n: int = 6, c: int = 16, q: int = 24, kv: int = 8) -> list[Tensor]:
    """Return x, weight, bias."""
    shapes = (n, c), (q + 2 * kv, c), (q + 2 * kv,)
    return [rand(*s, seed=i).mul_(s[-1] ** -0.5).requires_grad_() for i, s in enumerate(shapes)]


def results(leaves: list[Tensor], fn: object = ops.linear_qkv) -> list[Tensor]:
    """Return the outputs and all gradients."""
    parts = fn(*leaves, n_kv=8)  # type: ignore[operator]
    return [*parts, *torch.autograd.grad(parts, leaves, [rand(*y.shape, seed=9 + i) for i, y in enumerate(parts)])]


def test_the_fallback_is_a_layer_and_a_split() -> None:
    leaves = arguments()
    with use(linear_qkv="torch"):
        got = results(leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, results(leaves, linear_qkv_torch), strict=True))


class Concatenations(TorchDispatchMode):
    """Keeps the number of dimensions of what aten::cat returns."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.cat.default:
            self.found.append(out.dim())
        return out


@ON
def test_the_parts_share_one_tensor_and_only_their_bias_is_concatenated(name: str) -> None:
    leaves = arguments()
    for which, found in ((name, [1]), ("torch", [2])):
        with use(strict=True, linear_qkv=which):
            parts = ops.linear_qkv(*leaves, n_kv=8)
        assert all(a.data_ptr() + a.shape[1] * 4 == b.data_ptr() for a, b in pairwise(parts))
        with Concatenations() as seen:
            torch.autograd.grad(parts, leaves, [rand(*y.shape) for y in parts])
        assert seen.found == found


@ON
def test_a_part_that_is_not_used_has_no_gradient(name: str) -> None:
    leaves = arguments()
    found = []
    for which in (name, "torch"):
        with use(strict=True, linear_qkv=which):
            q, _, v = ops.linear_qkv(*leaves, n_kv=8)
        found.append(torch.autograd.grad((q, v), leaves, (rand(6, 24), rand(6, 8, seed=1))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@ON
def test_gradients_go_to_the_buffer_of_the_weight(name: str) -> None:
    layer = nn.Linear(16, 40).to(DEVICE)
    nn.keep_gradients(layer, min_numel=1)
    x, grads = rand(6, 16), [rand(6, n, seed=n) for n in (24, 8, 8)]
    with use(strict=True, linear_qkv=name):
        for _ in range(2):
            torch.autograd.backward(ops.linear_qkv(x, layer.weight, layer.bias, n_kv=8), grads)
    leaves = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    torch.autograd.backward(linear_qkv_torch(x, *leaves, n_kv=8), [2 * g for g in grads])
    for p, leaf in zip(layer.parameters(), leaves, strict=True):
        torch.testing.assert_close(p.grad, leaf.grad)
    assert layer.weight.grad is layer.weight.grad_buffer


@ON
def test_only_what_needs_a_gradient_gets_one(name: str) -> None:
    with use(strict=True, linear_qkv=name):
        for which in range(3):
            leaves = [t.detach() for t in arguments()]
            leaves[which].requires_grad_()
            torch.cat(ops.linear_qkv(*leaves, n_kv=8), 1).sum().backward()
            assert [t.grad is not None for t in leaves] == [i == which for i in range(3)]


@ON
def test_fullgraph_compile_with_a_dynamic_number_of_rows(name: str) -> None:
    def call(*leaves: Tensor, n_kv: int) -> tuple[Tensor, ...]:
        return ops.linear_qkv(*leaves, n_kv=8)  # a constant, as in a model

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with use(strict=True, linear_qkv=name):
        for n in (4, 9):
            leaves = arguments(n)
            torch._dynamo.mark_dynamic(leaves[0], 0)
            for a, b in zip(results(leaves, compiled), results(leaves), strict=True):
                torch.testing.assert_close(a, b)


@ON
def test_no_tile_reads_or_writes_past_its_edges(name: str) -> None:
    """Inputs in wider buffers of NaN give the values of copies. A NaN in a row of dv reaches this row of dx alone."""

    grads, weight = [rand(70, n, seed=n) for n in (33, 67, 67)], rand(167, 66)
    dx = LINEAR_QKV_BWD[name](*map(among_nans, grads), among_nans(weight))
    assert torch.equal(dx, LINEAR_QKV_BWD[name](*grads, weight)) and not dx.isnan().any()
    torch.testing.assert_close(dx, torch.cat(grads, 1) @ weight)
    grads[2][69, 66] = math.nan
    dx = LINEAR_QKV_BWD[name](*grads, weight)
    assert dx[69].isnan().all() and not dx[:69].isnan().any()


@ON
def test_autocast_casts_x_weight_and_bias(name: str) -> None:
    leaves = arguments()
    with use(strict=True, linear_qkv=name), torch.autocast(DEVICE, dtype=torch.bfloat16):
        parts = ops.linear_qkv(*leaves, n_kv=8)
    torch.cat(parts, 1).sum().backward()
    assert parts[0].dtype == torch.bfloat16
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in leaves)
