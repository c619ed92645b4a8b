"""Data of linear for the tests that run on every op."""

import torch

from contract import Calls, Errors, rand
from fastgpt import ops
from fastgpt.ops.linear import LINEAR_FWD

RUN_SHAPE = (7, 528, 67)
NARROW, SCALE = torch.ones(5, 8, dtype=torch.int8), torch.ones(5)
ERRORS: Errors = [
    (lambda: ops.linear(rand(2, 7), NARROW, scale=SCALE), ValueError, r"weight has shape \(5, 8\), expected \(F, C\)"),
    (lambda: ops.linear(rand(2, 8), rand(5, 8), scale=SCALE), TypeError, "weight is torch.float32 with a scale"),
    (lambda: ops.linear(rand(2, 8), NARROW, scale=SCALE[:4]), ValueError, r"scale has shape \(4,\), expected \(5,\)"),
    (lambda: ops.linear(rand(2, 8), NARROW, rand(4), scale=SCALE), ValueError, r"bias has shape \(4,\), expected"),
    (lambda: ops.linear(rand(2, 8).requires_grad_(), NARROW, scale=SCALE), ValueError, "needs a gradient"),
    (lambda: ops.linear(rand(2, 8).requires_grad_(), rand(5, 8).bfloat16()), ValueError, "needs a gradient"),
]


def calls(name: str) -> Calls:
    x, bias = rand(2, 3, 33), rand(5, seed=2)
    draws = torch.randint(-127, 128, (5, 33), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    return {
        "linear_fwd": (LINEAR_FWD[name], (x, rand(5, 33, seed=1), None, bias)),
        "linear_fwd int8": (LINEAR_FWD[name], (x, draws, rand(5, seed=3).abs(), None)),
    }
