"""gelu_mlp: kernels against the layers one by one, recomputation, kept gradients, compile, tiles at every edge."""

import math

import pytest
import torch
from contract import DEVICE, among_nans, rand
from torch import Tensor

from fastgpt import nn, ops, parity
from fastgpt.core.backend import use
from fastgpt.ops.bias_gelu import BIAS_GELU_FWD
from fastgpt.ops.gelu_mlp import GELU_MLP_BWD, GELU_MLP_FWD

ON = pytest.mark.parametrize("name", parity.backends_here("gelu_mlp"))


def arguments(n: int = 6, c: int = 16, f: int = 40, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return x, W1, b1, W2, b2."""
    shapes = (n, c), (f, c), (f,), (c, f), (c,)
    return [rand(*s, seed=i).mul_(s[-1] ** -0.5).to(dtype).requires_grad_() for i, s in enumerate(shapes)]


def results(leaves: list[Tensor], **options: object) -> list[Tensor]:
    """Return the output and all gradients."""
    y = ops.gelu_mlp(*leaves, approximate="tanh", **options)  # type: ignore[arg-type]
    return [y, *torch.autograd.grad(y, leaves, rand(*y.shape, seed=9).to(y.dtype))]


def test_the_fallback_is_the_layers_one_by_one() -> None:
    leaves = arguments()
    x, up, up_bias, down, down_bias = leaves
    with use(gelu_mlp="torch"):
        got = results(leaves)
    y = ops.linear(ops.bias_gelu(ops.linear(x, up), up_bias, approximate="tanh"), down, down_bias)
    wanted = [y, *torch.autograd.grad(y, leaves, rand(*y.shape, seed=9))]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@ON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_activation_is_that_of_bias_gelu(name: str, dtype: torch.dtype) -> None:
    """GELU sees the product as it was rounded and saved, so a recomputed activation has the same bits."""
    x, up, bias, _, _ = (t.detach() for t in arguments(70, 16, 80, dtype))
    for tanh in (False, True):
        u, h = GELU_MLP_FWD[name](x, up, bias, tanh)
        assert torch.equal(h, BIAS_GELU_FWD[name](u, bias, tanh))


@ON
def test_recompute_gives_the_same_bits_and_keeps_less(name: str) -> None:
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept[-1] += t.numel()
        return t

    found = []
    with use(strict=True, gelu_mlp=name):
        for recompute in (False, True):
            kept.append(0)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                found.append(results(arguments(), recompute=recompute))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert kept[0] - kept[1] == 6 * 40


@ON
def test_gradients_go_to_the_buffers_of_the_weights(name: str) -> None:
    layers = torch.nn.Sequential(nn.Linear(16, 40), nn.Linear(40, 16)).to(DEVICE)
    nn.keep_gradients(layers, min_numel=1)
    x, dy = rand(6, 16), rand(6, 16, seed=1)
    with use(strict=True, gelu_mlp=name):
        for _ in range(2):
            y = ops.gelu_mlp(x, layers[0].weight, layers[0].bias, layers[1].weight, layers[1].bias)
            y.backward(dy)
    leaves = [p.detach().clone().requires_grad_() for p in layers.parameters()]
    with use(gelu_mlp="torch"):
        ops.gelu_mlp(x, *leaves).backward(2 * dy)
    for p, leaf in zip(layers.parameters(), leaves, strict=True):
        torch.testing.assert_close(p.grad, leaf.grad)
    assert all(layer.weight.grad is layer.weight.grad_buffer for layer in layers)


@ON
def test_only_what_needs_a_gradient_gets_one(name: str) -> None:
    with use(strict=True, gelu_mlp=name):
        for which in range(5):
            leaves = [t.detach() for t in arguments()]
            leaves[which].requires_grad_()
            ops.gelu_mlp(*leaves).sum().backward()
            assert [t.grad is not None for t in leaves] == [i == which for i in range(5)]


@ON
def test_fullgraph_compile_with_dynamic_shapes(name: str) -> None:
    compiled = torch.compile(ops.gelu_mlp, fullgraph=True, backend="aot_eager", dynamic=True)
    with use(strict=True, gelu_mlp=name):
        for n in (4, 9):
            leaves = arguments(n)
            y = compiled(*leaves)
            got = [y, *torch.autograd.grad(y, leaves, rand(*y.shape, seed=9))]
            other = ops.gelu_mlp(*leaves)
            wanted = [other, *torch.autograd.grad(other, leaves, rand(*y.shape, seed=9))]
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a, b)


@ON
def test_no_tile_reads_or_writes_past_its_edges(name: str) -> None:
    """Inputs in wider buffers of NaN give the values of copies. A NaN in a row of x reaches this row of u alone."""

    x, up, bias, down, _ = (t.detach() for t in arguments(70, 33, 67))
    u, h = GELU_MLP_FWD[name](among_nans(x), among_nans(up), bias, False)
    assert torch.equal(u, GELU_MLP_FWD[name](x, up, bias, False)[0]) and not h.isnan().any()
    du, dbias = GELU_MLP_BWD[name](among_nans(x), among_nans(down.t().contiguous().t()), among_nans(u), bias, False)
    assert not du.isnan().any() and not dbias.isnan().any()
    x[69, 32] = math.nan
    u, _ = GELU_MLP_FWD[name](x, up, bias, False)
    assert u[69].isnan().all() and not u[:69].isnan().any()


@ON
def test_autocast_casts_x_and_weights(name: str) -> None:
    leaves = arguments()
    with use(strict=True, gelu_mlp=name), torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = ops.gelu_mlp(*leaves)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and all(t.grad is not None and t.grad.dtype == torch.float32 for t in leaves)
