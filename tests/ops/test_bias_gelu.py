"""bias_gelu: the accuracy that math.h states."""

import math

import pytest
import torch
from contract import both_signs, in_ulps

from fastgpt import parity
from fastgpt.ops.bias_gelu import BIAS_GELU_BWD, BIAS_GELU_FWD


@pytest.mark.skipif("cpu" not in parity.backends_here("bias_gelu"), reason="needs the compiled CPU kernels")
def test_relative_error_is_what_math_h_states() -> None:
    """Check near 0, around 1 and in the tail, where 1 + erf has no digits left."""
    x = both_signs(1e-30, 13.0)
    wide = x.double()
    gelu = 0.5 * wide * torch.erfc(-wide / math.sqrt(2))
    relative = (BIAS_GELU_FWD["cpu"](x, None, False).double() / gelu - 1).abs()
    assert in_ulps(relative / torch.where(wide < 0, 1 + wide**2 / 8, 1.0)) <= 4
    near = wide.abs() < 9.8
    v = 2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    tanh = (BIAS_GELU_FWD["cpu"](x, None, True).double() / (wide * torch.sigmoid(v)) - 1).abs() / (1 + v.abs())
    assert in_ulps(tanh[near]) <= 2
    slope = BIAS_GELU_BWD["cpu"](torch.ones_like(x), x, None, False)[0].double()
    exact = 0.5 * torch.erfc(-wide / math.sqrt(2)) + wide * torch.exp(-wide.square() / 2) / math.sqrt(2 * math.pi)
    assert in_ulps((slope - exact).abs()) <= 2
