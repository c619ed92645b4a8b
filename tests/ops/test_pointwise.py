"""bias_gelu and swiglu: extreme values, compile, gradients, and no access outside the inputs."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from contract import DEVICE
from torch import Tensor

from fastgpt import ops, parity
from fastgpt.core.backend import use
from fastgpt.ops.bias_gelu import BIAS_GELU_BWD, BIAS_GELU_FWD
from fastgpt.ops.swiglu import SWIGLU_BWD, SWIGLU_FWD

OPS = [(op, name) for op in ("bias_gelu", "swiglu") for name in parity.backends_here(op)]
ON = pytest.mark.parametrize("op,name", OPS)
OF_ONE: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {  # functions of one tensor, by op
    "bias_gelu": {
        "gelu": lambda x: ops.bias_gelu(x),
        "gelu_tanh": lambda x: ops.bias_gelu(x, approximate="tanh"),
    },
    "swiglu": {
        "silu": lambda x: ops.swiglu(x, torch.ones_like(x)),
        "gelu": lambda x: ops.swiglu(x, torch.ones_like(x), activation="gelu"),
    },
}
EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@ON
def test_far_ends_and_nan(op: str, name: str) -> None:
    """Finite x saturates and never gives NaN; NaN stays NaN in its place only."""
    x = torch.tensor([-3e38, -1e20, -1e4, -90.0, -13.2, -9.95, 0.0, 13.2, 90.0, 1e4, 1e20, 3e38, math.nan]).to(DEVICE)
    for act, function in OF_ONE[op].items():
        leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        with use(strict=True, **{op: name}):
            y = function(leaf)
            y.sum().backward()
        wanted = EXACT[act](exact)
        wanted.sum().backward()
        assert y[-1].isnan() and leaf.grad is not None and leaf.grad[-1].isnan() and exact.grad is not None
        torch.testing.assert_close(y[:-1], wanted[:-1].float(), rtol=2e-5, atol=1e-12)
        torch.testing.assert_close(leaf.grad[:-1], exact.grad[:-1].float(), rtol=1e-6, atol=1e-6)


def gelus(x: Tensor, bias: Tensor) -> Tensor:
    return ops.bias_gelu(x, bias, approximate="tanh") + ops.bias_gelu(x)


def gates(x: Tensor, packed: Tensor) -> Tensor:
    return ops.swiglu(packed) * ops.swiglu(x, 2 * x, activation="gelu")


@ON
def test_fullgraph_compile_with_dynamic_shapes(op: str, name: str) -> None:
    function = gelus if op == "bias_gelu" else gates
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    with use(strict=True, **{op: name}):
        for n in (4, 9):
            results = []
            for fn in (compiled, function):
                g = torch.Generator().manual_seed(n)
                shapes = ((n, 33), (33,) if op == "bias_gelu" else (n, 66))
                leaves = [torch.randn(s, generator=g).to(DEVICE).requires_grad_() for s in shapes]
                out = fn(*leaves)
                out.sum().backward()
                results.append([out.detach(), *(t.grad for t in leaves)])
            for a, b in zip(*results):
                torch.testing.assert_close(a, b)


@ON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 16, 33, 770])
def test_nothing_is_read_past_a_row(op: str, name: str, dtype: torch.dtype, width: int) -> None:
    """Rows in a wider buffer of NaN give the values of a copy, and inputs do not change."""
    wide = torch.full((5, 2 * width + 6), math.nan, dtype=dtype, device=DEVICE)
    wide[:, 3:-3] = torch.randn(5, 2 * width, generator=torch.Generator().manual_seed(width)).to(DEVICE, dtype)
    x, before = wide[:, 3:-3], wide.clone()
    around = torch.full((2 * width + 2,), math.nan, dtype=dtype, device=DEVICE)
    around[1:-1] = 0.5
    fwd, bwd = (BIAS_GELU_FWD, BIAS_GELU_BWD) if op == "bias_gelu" else (SWIGLU_FWD, SWIGLU_BWD)
    second, dy = (around[1:-1], x) if op == "bias_gelu" else (None, x[:, :width])
    got = fwd[name](x, second, 0)
    assert torch.equal(got, fwd[name](x.clone(), second, 0)) and not got.isnan().any() and got.is_contiguous()
    grads = bwd[name](dy, x, second, 1)
    assert not any(grad.isnan().any() for grad in grads if grad is not None)
    assert torch.equal(wide.view(torch.uint8), before.view(torch.uint8))


@ON
def test_only_what_needs_a_gradient_gets_one_and_backward_repeats(op: str, name: str) -> None:
    g = torch.Generator().manual_seed(0)
    pair = [torch.randn(s, generator=g).to(DEVICE) for s in ((4, 8), (8,) if op == "bias_gelu" else (4, 8))]
    with use(strict=True, **{op: name}):
        for which in range(2):
            leaves = [t.clone() for t in pair]
            leaves[which].requires_grad_()
            y = getattr(ops, op)(*leaves)
            y.sum().backward(retain_graph=True)
            once = leaves[which].grad
            assert once is not None and leaves[1 - which].grad is None
            once = once.clone()
            y.sum().backward()
            torch.testing.assert_close(leaves[which].grad, 2 * once, rtol=0, atol=0)
