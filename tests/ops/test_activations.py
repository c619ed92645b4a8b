"""bias_gelu and swiglu: the accuracy that math.h states, far ends, compile, and that inputs and neighbours survive."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops, parity
from fastgpt.core.backend import use
from fastgpt.ops.bias_gelu import BIAS_GELU_BWD, BIAS_GELU_FWD
from fastgpt.ops.swiglu import SWIGLU_FWD

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON = pytest.mark.parametrize("name", parity.backends_here("bias_gelu"))
U = 2.0**-23


def points(low: float, high: float) -> Tensor:
    x = torch.logspace(math.log10(low), math.log10(high), 200_001, dtype=torch.float64).float().to(DEVICE)
    return torch.cat((x, -x))


def worst(error: Tensor) -> float:
    return float(error.max()) / U


@pytest.mark.skipif("cpu" not in parity.backends_here("bias_gelu"), reason="needs the compiled CPU kernels")
def test_relative_error_is_what_math_h_states() -> None:
    """Near 0, around 1 and in the tail, where 1 + erf has no digits left."""
    x = points(1e-30, 13.0)
    wide = x.double()
    gelu = 0.5 * wide * torch.erfc(-wide / math.sqrt(2))
    relative = (BIAS_GELU_FWD["cpu"](x, None, False).double() / gelu - 1).abs()
    assert worst(relative / torch.where(wide < 0, 1 + wide**2 / 8, 1.0)) <= 4
    near = wide.abs() < 9.8
    v = 2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    tanh = (BIAS_GELU_FWD["cpu"](x, None, True).double() / (wide * torch.sigmoid(v)) - 1).abs() / (1 + v.abs())
    assert worst(tanh[near]) <= 2
    y = points(1e-30, 85.0)
    silu = SWIGLU_FWD["cpu"](y, torch.ones_like(y), 0).double() / (y.double() * torch.sigmoid(y.double())) - 1
    assert worst(silu.abs()) <= 3
    slope = BIAS_GELU_BWD["cpu"](torch.ones_like(x), x, None, False)[0].double()
    exact = 0.5 * torch.erfc(-wide / math.sqrt(2)) + wide * torch.exp(-wide.square() / 2) / math.sqrt(2 * math.pi)
    assert worst((slope - exact).abs()) <= 2


@ON
def test_far_ends_and_nan(name: str) -> None:
    """Saturated, never NaN for finite x; NaN stays NaN, and only where it was."""
    x = torch.tensor([-3e38, -1e20, -1e4, -90.0, -13.2, -9.95, 0.0, 13.2, 90.0, 1e4, 1e20, 3e38, math.nan]).to(DEVICE)
    for act in ("silu", "gelu", "tanh"):
        leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        with use(strict=True, bias_gelu=name, swiglu=name):
            if act == "tanh":
                y = ops.bias_gelu(leaf, approximate="tanh")
                wanted = F.gelu(exact, approximate="tanh")
            else:
                y = ops.swiglu(leaf, torch.ones_like(x), activation=act)
                wanted = getattr(F, act)(exact)
            y.sum().backward()
            wanted.sum().backward()
        assert y[-1].isnan() and leaf.grad is not None and leaf.grad[-1].isnan() and exact.grad is not None
        torch.testing.assert_close(y[:-1], wanted[:-1].float(), rtol=2e-5, atol=1e-12)
        torch.testing.assert_close(leaf.grad[:-1], exact.grad[:-1].float(), rtol=1e-6, atol=1e-6)


def mlp(x: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    h = ops.bias_gelu(x, bias, approximate="tanh") + ops.bias_gelu(x)
    return ops.swiglu(gate) * ops.swiglu(h, x, activation="gelu")


@ON
def test_fullgraph_compile_with_dynamic_shapes(name: str) -> None:
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager", dynamic=True)
    with use(strict=True, bias_gelu=name, swiglu=name):
        for n in (4, 9):
            results = []
            for fn in (compiled, mlp):
                g = torch.Generator().manual_seed(n)
                leaves = [torch.randn(s, generator=g).to(DEVICE).requires_grad_() for s in ((n, 33), (33,), (n, 66))]
                out = fn(*leaves)
                out.sum().backward()
                results.append([out.detach(), *(t.grad for t in leaves)])
            for a, b in zip(*results):
                torch.testing.assert_close(a, b)


@ON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 16, 33, 770])
def test_nothing_is_read_past_a_row(name: str, dtype: torch.dtype, width: int) -> None:
    """Rows in a wider buffer of NaN: values as of a copy, inputs as they were."""
    wide = torch.full((5, 2 * width + 6), math.nan, dtype=dtype, device=DEVICE)
    wide[:, 3:-3] = torch.randn(5, 2 * width, generator=torch.Generator().manual_seed(width)).to(DEVICE, dtype)
    x, before = wide[:, 3:-3], wide.clone()
    bias = torch.full((2 * width + 2,), math.nan, dtype=dtype, device=DEVICE)
    bias[1:-1] = 0.5
    for fn in (lambda t: BIAS_GELU_FWD[name](t, bias[1:-1], False), lambda t: SWIGLU_FWD[name](t, None, 0)):
        got = fn(x)
        assert torch.equal(got, fn(x.clone())) and not got.isnan().any() and got.is_contiguous()
    dx, dbias = BIAS_GELU_BWD[name](x, x, bias[1:-1], True)
    assert not dx.isnan().any() and not dbias.isnan().any()
    assert torch.equal(wide.view(torch.uint8), before.view(torch.uint8))


@ON
def test_only_what_needs_a_gradient_gets_one_and_backward_repeats(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, bias, up = (torch.randn(s, generator=g).to(DEVICE) for s in ((4, 8), (8,), (4, 8)))
    with use(strict=True, bias_gelu=name, swiglu=name):
        for fn, pair in ((ops.bias_gelu, (x, bias)), (ops.swiglu, (x, up))):
            for which in range(2):
                leaves = [t.clone() for t in pair]
                leaves[which].requires_grad_()
                y = fn(*leaves)
                y.sum().backward(retain_graph=True)
                once = leaves[which].grad
                assert once is not None and leaves[1 - which].grad is None
                once = once.clone()
                y.sum().backward()
                torch.testing.assert_close(leaves[which].grad, 2 * once, rtol=0, atol=0)
