"""Data of gelu_mlp for the tests that run on every op."""

import torch

from contract import Calls, Errors, Far, rand
from fastgpt import ops
from fastgpt.ops.gelu_mlp import GELU_MLP_BWD, GELU_MLP_FWD

RUN_SHAPE = (70, 64, 80, 64)  # several tiles in both dimensions
UP, DOWN = torch.rand(48, 32), torch.rand(32, 48)
FAR: Far = {
    "gelu_mlp": lambda x: ops.gelu_mlp(x, UP.to(x.dtype), x[0].repeat(2)[:48], DOWN.to(x.dtype)),
    "gelu_mlp weight": lambda x: ops.gelu_mlp(UP.to(x.dtype)[:5], x, None, DOWN.to(x.dtype)[:, :3]),
}
X = rand(2, 7)
ERRORS: Errors = [
    (lambda: ops.gelu_mlp(X, rand(9, 8), None, rand(7, 9)), ValueError, r"up_weight has shape \(9, 8\), expected"),
    (lambda: ops.gelu_mlp(X, rand(9, 7), None, rand(7, 8)), ValueError, r"down_weight has shape \(7, 8\), expected"),
    (lambda: ops.gelu_mlp(X, rand(9, 7), rand(8), rand(7, 9)), ValueError, r"up_bias has shape \(8,\), expected \(9,"),
    (lambda: ops.gelu_mlp(X, rand(9, 7).half(), None, rand(7, 9)), TypeError, "up_weight is torch.float16, expected"),
    (lambda: ops.gelu_mlp(X, rand(9, 7), None, rand(7, 9), rand(9)), ValueError, r"down_bias has shape \(9,\)"),
    (lambda: ops.gelu_mlp(X, rand(9, 7), None, rand(7, 9), approximate="sigmoid"), ValueError, "is 'sigmoid'"),
]


def calls(name: str) -> Calls:
    x, up, down, bias = rand(6, 33), rand(20, 33, seed=1), rand(33, 20, seed=2), rand(20, seed=3)
    u = rand(6, 20, seed=4)
    return {
        "gelu_mlp_fwd": (GELU_MLP_FWD[name], (x, up, bias, False)),
        "gelu_mlp_fwd plain": (GELU_MLP_FWD[name], (rand(33, 6).t(), up, None, True)),
        "gelu_mlp_bwd": (GELU_MLP_BWD[name], (x, down, u, bias, True)),
        "gelu_mlp_bwd plain": (GELU_MLP_BWD[name], (x, down, u, None, False)),
    }
