"""Data of layer_norm for the tests that run on every op."""

import torch

from contract import Calls, Errors, Far, Mutations, Race, Races, race_of_a_sum, rand
from fastgpt import ops
from fastgpt.ops.layer_norm import LAYER_NORM_BWD, LAYER_NORM_FWD

FAR: Far = {
    "layer_norm": lambda x: ops.layer_norm(x, residual=x, x_bias=x[0]),
}
ERRORS: Errors = [
    (lambda: ops.layer_norm(rand(2, 8), rand(7)), ValueError, r"layer_norm: weight has shape \(7,\), expected \(8,\)"),
    (lambda: ops.layer_norm(rand(2, 8), rand(8).half()), TypeError, "layer_norm: weight is torch.float16, expected"),
    (lambda: ops.layer_norm(rand(2, 8), residual=rand(3, 8)), ValueError, r"residual has shape \(3, 8\)"),
    (lambda: ops.layer_norm(rand(2, 8).long()), TypeError, "layer_norm: x is torch.int64, expected a floating-point"),
    (lambda: ops.layer_norm(rand(2, 0)), ValueError, r"layer_norm: x has shape \(2, 0\)"),
    (
        lambda: ops.layer_norm(rand(2, 8), x_bias=rand(8)),
        ValueError,
        "layer_norm: x_bias without residual, expected both",
    ),
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
RACES: Races = {
    "barrier of a reduction": Race(
        "layer_norm_bwd_kernel",
        "core/cuda/reduce.cuh",
        "mine[n_warps + threadIdx.x / 32] = b;\n  }\n  __syncthreads();",
        "mine[n_warps + threadIdx.x / 32] = b;\n  }",
        ("    mine[threadIdx.x / 32] = a;", "a = warp_sum(lane < n_warps ? mine[lane]"),
        slow=True,
    ),
    "wait group one too high": Race(
        "layer_norm_bwd_kernel",
        "layer_norm/cuda.cu",
        "ptx::cp_async_wait<1>();",
        "ptx::cp_async_wait<2>();",
        ("ring.get(set, 0, i, dy);", "  ring.request_row(a, row, 0);"),
    ),
    "stage of the ring reused one step early": Race(
        "layer_norm_bwd_kernel",
        "layer_norm/cuda.cu",
        "ring.request_row(a, row + step, set ^ 1);",
        "ring.request_row(a, row + step, set);",
        ("ring.request_row(a, row + step, set);", "  ring.request_row(a, row, 0);"),
        slow=True,
    ),
    "barrier between ring and partials": Race(
        "layer_norm_bwd_kernel",
        "layer_norm/cuda.cu",
        "  __syncthreads();  // the ring is no longer in use\n",
        "",
        ("write_partial(dw, n, shared, partial);", "ring.request_row(a, row + step, set ^ 1);"),
        slow=True,
    ),
    "barrier of the means of wide rows": Race(
        "layer_norm_bwd_wide_kernel",
        "layer_norm/cuda.cu",
        "means[set][r][1] = dot / n;\n    }\n    __syncthreads();",
        "means[set][r][1] = dot / n;\n    }",
        ("means[set][r][0] = sum / n,", "wdy[l] = layer_norm_dx(wdy[l] * w[l], xhat[l], means[set][r][0]"),
        slow=True,
    ),
    "barrier of the partials' reduce": Race(
        "add_partials_kernel",
        "core/cuda/partials.cuh",
        "sums[threadIdx.x][threadIdx.y] = sum;\n  __syncthreads();",
        "sums[threadIdx.x][threadIdx.y] = sum;",
        ("sums[threadIdx.x][threadIdx.y] = sum;", "warp_sum(sums[threadIdx.y][threadIdx.x]);"),
        slow=True,
    ),
    "barrier of a sum": race_of_a_sum("layer_norm_fwd_kernel"),
    "scratch of two sums": Race(
        "layer_norm_fwd_wide_kernel",
        "layer_norm/cuda.cu",
        "return (x - mean) * (x - mean); });\n  }\n  const float rstd = 1.0f / sqrtf(row_sum(squares, scratch[1])",
        "return (x - mean) * (x - mean); });\n  }\n  const float rstd = 1.0f / sqrtf(row_sum(squares, scratch[0])",
        ("const float mean = row_sum(sum, scratch[0]) / n;", "row_sum(squares, scratch[0])"),
        slow=True,
    ),
}


def calls(name: str) -> Calls:
    x, w = rand(6, 33), rand(33)
    stats = torch.stack((x.mean(-1), torch.rsqrt(x.var(-1, unbiased=False) + 1e-5)))
    return {
        "layer_norm_fwd": (LAYER_NORM_FWD[name], (x, rand(6, 33, seed=1), w, w, 1e-5, w)),
        "layer_norm_fwd plain": (LAYER_NORM_FWD[name], (x, None, None, None, 1e-5)),
        "layer_norm_bwd": (LAYER_NORM_BWD[name], (x, rand(6, 33, seed=1), x, w, w, stats, w)),
        "layer_norm_bwd plain": (LAYER_NORM_BWD[name], (x, None, x, None, None, stats)),
    }
