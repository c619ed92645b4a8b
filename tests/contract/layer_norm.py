"""Data of layer_norm for the tests that run on every op."""

import torch

from contract import Calls, Errors, Far, Mutations, rand
from fastgpt import ops
from fastgpt.ops.layer_norm import LAYER_NORM_BWD, LAYER_NORM_FWD

FAR: Far = {
    "layer_norm": lambda x: ops.layer_norm(x, residual=x),
}
ERRORS: Errors = [
    (lambda: ops.layer_norm(rand(2, 8), rand(7)), ValueError, r"layer_norm: weight has shape \(7,\), expected \(8,\)"),
    (lambda: ops.layer_norm(rand(2, 8), rand(8).half()), TypeError, "layer_norm: weight is torch.float16, expected"),
    (lambda: ops.layer_norm(rand(2, 8), residual=rand(3, 8)), ValueError, r"residual has shape \(3, 8\)"),
    (lambda: ops.layer_norm(rand(2, 8).long()), TypeError, "layer_norm: x is torch.int64, expected a floating-point"),
    (lambda: ops.layer_norm(rand(2, 0)), ValueError, r"layer_norm: x has shape \(2, 0\)"),
]
MUTATIONS: Mutations = {
    "barrier of a reduction": (
        "core/cuda/reduce.cuh",
        "mine[n_warps + threadIdx.x / 32] = b;\n  }\n  __syncthreads();",
        "mine[n_warps + threadIdx.x / 32] = b;\n  }",
    ),
    "barrier of the partials' reduce": (
        "core/cuda/partials.cuh",
        "sums[threadIdx.x][threadIdx.y] = sum;\n  __syncthreads();",
        "sums[threadIdx.x][threadIdx.y] = sum;",
    ),
    "alignment": ("core/cuda/vec.cuh", "if (!is_aligned(p)) return false;", "static_cast<void>(p);"),
    "lane that stays away": (
        "layer_norm/cuda.cu",
        "row_sum2(sum, dot, scratch[set]);",
        "if (threadIdx.x != 5) row_sum2(sum, dot, scratch[set]);",
    ),
    "row that is written over while it is read": (
        "layer_norm/cuda.cu",
        "ring.request_row(a, row + step, set ^ 1);",
        "ring.request_row(a, row + step, set);",
    ),
}
ASTRAY: Mutations = {
    "row bound": ("layer_norm/cuda.cu", "  if (row >= a.n_rows) return;\n", ""),
    "column mask of a store": (
        "layer_norm/cuda.cu",
        "    if (c >= a.n_cols) continue;\n    float y[L], w[L], b[L];",
        "    float y[L], w[L], b[L];",
    ),
    "column mask of a load": ("norm/cuda.cuh", "if (c < n) load_raw(row + c, x[i]);", "load_raw(row + c, x[i]);"),
}


def calls(name: str) -> Calls:
    x, w = rand(6, 33), rand(33)
    stats = torch.stack((x.mean(-1), torch.rsqrt(x.var(-1, unbiased=False) + 1e-5)))
    return {
        "layer_norm_fwd": (LAYER_NORM_FWD[name], (x, rand(6, 33, seed=1), w, w, 1e-5)),
        "layer_norm_fwd plain": (LAYER_NORM_FWD[name], (x, None, None, None, 1e-5)),
        "layer_norm_bwd": (LAYER_NORM_BWD[name], (x, rand(6, 33, seed=1), x, w, w, stats)),
        "layer_norm_bwd plain": (LAYER_NORM_BWD[name], (x, None, x, None, None, stats)),
    }
