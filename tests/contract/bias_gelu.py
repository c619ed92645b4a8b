"""Data of bias_gelu for the tests that run on every op."""

from contract import Calls, Errors, Far, Mutations, Race, Races, rand
from fastgpt import ops
from fastgpt.ops.bias_gelu import BIAS_GELU_BWD, BIAS_GELU_FWD

FAR: Far = {
    "bias_gelu": lambda x: ops.bias_gelu(x, x[0]),
}
ERRORS: Errors = [
    (lambda: ops.bias_gelu(rand(2, 7), rand(8)), ValueError, r"bias has shape \(8,\), expected \(7,\)"),
    (lambda: ops.bias_gelu(rand(2, 7), rand(7).half()), TypeError, "bias_gelu: bias is torch.float16, expected"),
    (lambda: ops.bias_gelu(rand()), ValueError, r"bias_gelu: x has shape \(\)"),
    (lambda: ops.bias_gelu(rand(2, 7), approximate="sigmoid"), ValueError, "approximate is 'sigmoid'"),
]
MUTATIONS: Mutations = {
    "row mask of a sum": ("bias_gelu/cuda.cu", "      if (row >= n_rows) continue;\n      float u", "      float u"),
}
ASTRAY: Mutations = {
    "column bound of a tile": (
        "bias_gelu/cuda.cu",
        "  if (c >= a.n_cols) return;\n  Raw<T, L> x[kRows];",
        "  Raw<T, L> x[kRows];",
    ),
}
RACES: Races = {
    "barrier between row groups": Race(
        "bias_gelu_bwd_kernel",
        "core/cuda/partials.cuh",
        "    if (!last) __syncthreads();\n",
        "",
        ("else store_shared(shared, c, total);", "if (y > 0) load_shared(shared, c, total);"),
    ),
}


def calls(name: str) -> Calls:
    x, dy, bias = rand(6, 33), rand(6, 33, seed=1), rand(33, seed=2)
    return {
        "bias_gelu_fwd": (BIAS_GELU_FWD[name], (x, bias, False)),
        "bias_gelu_fwd plain": (BIAS_GELU_FWD[name], (x.t(), None, True)),
        "bias_gelu_bwd": (BIAS_GELU_BWD[name], (dy, x, bias, True)),
        "bias_gelu_bwd plain": (BIAS_GELU_BWD[name], (dy, x, None, False)),
    }
