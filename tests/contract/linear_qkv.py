"""Data of linear_qkv for the tests that run on every op."""

import torch

from contract import Calls, Errors, Far, rand
from fastgpt import ops
from fastgpt.ops.linear_qkv import LINEAR_QKV_BWD

RUN_SHAPE = (70, 80, 128, 64)  # several tiles in both dimensions
WEIGHT = torch.rand(48, 32)
FAR: Far = {
    "linear_qkv": lambda x: ops.linear_qkv(x, WEIGHT.to(x.dtype), x[0].repeat(2)[:48], n_kv=8)[0],
    "linear_qkv weight": lambda x: ops.linear_qkv(WEIGHT.to(x.dtype)[:5], x, None, n_kv=1)[0],
}
X = rand(2, 7)
ERRORS: Errors = [
    (lambda: ops.linear_qkv(X, rand(9, 8), n_kv=2), ValueError, r"weight has shape \(9, 8\), expected"),
    (lambda: ops.linear_qkv(X, rand(9, 7), n_kv=5), ValueError, "n_kv is 5, expected 0 to half of weight's 9 rows"),
    (lambda: ops.linear_qkv(X, rand(9, 7), rand(8), n_kv=2), ValueError, r"bias has shape \(8,\), expected \(9,"),
    (lambda: ops.linear_qkv(X, rand(9, 7).half(), n_kv=2), TypeError, "weight is torch.float16, expected"),
]


def calls(name: str) -> Calls:
    dq, dk, dv = rand(6, 20), rand(6, 12, seed=1), rand(6, 12, seed=2)
    weight = rand(44, 33, seed=3)
    return {
        "linear_qkv_bwd": (LINEAR_QKV_BWD[name], (dq, dk, dv, weight)),
        "linear_qkv_bwd strided": (LINEAR_QKV_BWD[name], (rand(20, 6).t(), dk, dv, weight)),
    }
