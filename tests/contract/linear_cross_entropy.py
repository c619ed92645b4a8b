"""Data of linear_cross_entropy for the tests that run on every op."""

import torch

from contract import Errors, Far, rand
from fastgpt import ops

WEIGHT, TARGET, LAST = torch.rand(7, 32), torch.tensor([3, 0, 6]), torch.tensor([2, 0, 1])
RUN_SHAPE = (13, 16, 61)
FAR: Far = {
    "linear_cross_entropy": lambda x: ops.linear_cross_entropy(x, WEIGHT.to(x.dtype), TARGET, reduction="none"),
    "linear_cross_entropy weight": lambda x: ops.linear_cross_entropy(WEIGHT.to(x.dtype)[:3], x, LAST, chunk=2),
}
ERRORS: Errors = [
    (lambda: ops.linear_cross_entropy(rand(2, 4), rand(9, 5), torch.tensor([0, 1])), ValueError, r"expected \(N, C\)"),
]
