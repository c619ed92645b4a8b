"""Data of rms_norm for the tests that run on every op."""

import torch

from contract import Calls, Errors, Far, Mutations, Race, Races, race_of_a_sum, rand
from fastgpt import ops
from fastgpt.ops.rms_norm import RMS_NORM_BWD, RMS_NORM_FWD

FAR: Far = {
    "rms_norm": lambda x: ops.rms_norm(x, residual=x),
}
ERRORS: Errors = [
    (lambda: ops.rms_norm(rand(2, 7), rand(8)), ValueError, r"rms_norm: weight has shape \(8,\)"),
    (lambda: ops.rms_norm(rand(2, 8), residual=rand(3, 8)), ValueError, r"rms_norm: residual has shape \(3, 8\)"),
    (lambda: ops.rms_norm(rand(2, 0)), ValueError, r"rms_norm: x has shape \(2, 0\)"),
    (
        lambda: ops.rms_norm(rand(2, 8), residual=rand(2, 8), x_bias=rand(7)),
        ValueError,
        r"rms_norm: x_bias has shape \(7,\)",
    ),
]
MUTATIONS: Mutations = {
    "copy that is not waited for": ("rms_norm/cuda.cu", "cp_async_wait<1>", "cp_async_wait<2>"),
    "barrier between rows' sums": ("core/cuda/partials.cuh", "    if (!last) __syncthreads();\n", ""),
}
ASTRAY: Mutations = {
    "row bound of a copy": (
        "norm/cuda.cuh",
        "const int n = row < a.n_rows ? static_cast<int>(a.n_cols) : 0;",
        "const int n = static_cast<int>(a.n_cols);",
    ),
}
RACES: Races = {
    "wait group one too high": Race(
        "rms_norm_bwd_kernel",
        "rms_norm/cuda.cu",
        "ptx::cp_async_wait<1>();",
        "ptx::cp_async_wait<2>();",
        ("      ring.get(set, 0, i, dy);", "  ring.request_row(a, row, 0);"),
        slow=True,
    ),
    "scratch of a reduction reused one row early": Race(
        "rms_norm_bwd_kernel",
        "rms_norm/cuda.cu",
        "row_sum(dot, scratch[set])",
        "row_sum(dot, scratch[0])",
        ("row_sum(dot, scratch[0])", "row_sum(dot, scratch[0])"),
        slow=True,
    ),
    "barrier of a sum": race_of_a_sum("rms_norm_fwd_kernel"),
    "scale that every thread writes": Race(
        "rms_norm_fwd_wide_kernel",
        "rms_norm/cuda.cu",
        "row_sum(squares, scratch) / n + a.eps);\n  if (threadIdx.x == 0) a.rstd[row] = rstd;\n  for",
        "row_sum(squares, scratch) / n + a.eps);\n  a.rstd[row] = rstd;\n  for",
        ("  a.rstd[row] = rstd;\n", "  a.rstd[row] = rstd;\n"),
        slow=True,
    ),
    "barrier of the means of wide rows": Race(
        "rms_norm_bwd_wide_kernel",
        "rms_norm/cuda.cu",
        "means[set][r] = dot / n;\n    }\n    __syncthreads();",
        "means[set][r] = dot / n;\n    }",
        ("if (threadIdx.x == 0) means[set][r] = dot / n;", "const RmsNormDx dx(means[set][r], rstd, n, a.eps);"),
        slow=True,
    ),
}


def calls(name: str) -> Calls:
    x, w = rand(6, 33), rand(33)
    rstd = torch.rsqrt(x.var(-1, unbiased=False) + 1e-5)
    return {
        "rms_norm_fwd": (RMS_NORM_FWD[name], (x, rand(6, 33, seed=1), w, 1e-6, 1.0, w)),
        "rms_norm_fwd plain": (RMS_NORM_FWD[name], (x, None, None, 1e-6, 0.0)),
        "rms_norm_bwd": (RMS_NORM_BWD[name], (x, rand(6, 33, seed=1), x, w, rstd, 1e-6, 1.0, w)),
        "rms_norm_bwd plain": (RMS_NORM_BWD[name], (x, None, x, None, rstd, 1e-6, 0.0)),
    }
