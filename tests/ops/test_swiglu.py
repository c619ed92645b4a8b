"""swiglu: the accuracy that math.h states."""

import pytest
import torch
from contract import both_signs, in_ulps

from fastgpt import parity
from fastgpt.ops.swiglu import SWIGLU_FWD


@pytest.mark.skipif("cpu" not in parity.backends_here("swiglu"), reason="needs the compiled CPU kernels")
def test_relative_error_is_what_math_h_states() -> None:
    x = both_signs(1e-30, 85.0)
    wide = x.double()
    silu = SWIGLU_FWD["cpu"](x, torch.ones_like(x), 0).double() / (wide * torch.sigmoid(wide)) - 1
    assert in_ulps(silu.abs()) <= 3
