"""Data of attention for the tests that run on every op."""

from contract import Errors, Far, Mutations, heads, rand
from fastgpt import ops

RUN_SHAPE = (2, 70, 70, 4, 2, 16)
FAR: Far = {
    "attention": lambda x: ops.attention(*[heads(x, 2)] * 3, causal=True),
    "attention packed": lambda x: ops.attention_qkv(heads(x, 4), n_heads=2, n_kv_heads=1, causal=True),
}
ERRORS: Errors = [
    (lambda: ops.attention(rand(1, 3, 3, 4), rand(1, 3, 2, 4), rand(1, 3, 2, 4)), ValueError, "multiple of k's 2"),
]
MUTATIONS: Mutations = {
    "barrier before the scores": (
        "attention/cuda_fwd.cu",
        "    __syncthreads();  // these keys have arrived, and the previous values are no longer needed\n",
        "",
    ),
    "barrier before the values": (
        "attention/cuda_fwd.cu",
        "    __syncthreads();  // these values have arrived, and the keys are no longer needed\n",
        "",
    ),
    "copies that nobody waits for": (
        "attention/cuda_fwd.cu",
        "    ptx::cp_async_wait<0>();\n    __syncthreads();  // these values",
        "    __syncthreads();  // these values",
    ),
    "barrier of the queries' stages": (
        "attention/cuda_dkdv.cu",
        "    __syncthreads();  // these queries have arrived, and those of the other stage are no longer needed\n",
        "",
    ),
    "barrier of the keys' stages": (
        "attention/cuda_bwd.cu",
        "    __syncthreads();  // these keys have arrived, and those of the other stage are no longer needed\n",
        "",
    ),
    "causal mask": (
        "attention/cuda_fwd.cu",
        "const bool whole = key0 >= sight.from && key0 + kKeys <= sight.to;",
        "const bool whole = true;",
    ),
    "mask of the keys' gradients": (
        "attention/cuda_dkdv.cu",
        "const bool whole = first >= sight.from && first + 16 * kM <= sight.to;",
        "const bool whole = true;",
    ),
    "window": ("attention/mask.h", "begin = position + 1 - a.window;", "begin = position - a.window;"),
    "last key": ("attention/cuda.cuh", "min(query + l.ahead,", "min(query + l.ahead + 1,"),
    "permutation of a tile on one side": (
        "core/cuda/tile.cuh",
        "(at ^ (32 * k & kTurned))",
        "(at + (32 * k & kTurned))",
    ),
}
