"""Data of swiglu for the tests that run on every op."""

from contract import Calls, Errors, Far, Mutations, Race, Races, rand
from fastgpt import ops
from fastgpt.ops.swiglu import SWIGLU_BWD, SWIGLU_FWD

FAR: Far = {
    "swiglu": lambda x: ops.swiglu(x, x),
    "swiglu packed": lambda x: ops.swiglu(x),
}
ERRORS: Errors = [
    (lambda: ops.swiglu(rand(2, 7)), ValueError, "packed gate has 7 columns"),
    (lambda: ops.swiglu(rand(2, 8), rand(2, 4)), ValueError, r"swiglu: up has shape \(2, 4\), expected \(2, 8\)"),
    (lambda: ops.swiglu(rand(2, 8), rand(2, 8).half()), TypeError, "swiglu: up is torch.float16, expected"),
    (lambda: ops.swiglu(rand(2, 8), activation="tanh"), ValueError, "activation is 'tanh', expected one of silu"),
    (lambda: ops.swiglu(rand()), ValueError, r"swiglu: gate has shape \(\)"),
]
MUTATIONS: Mutations = {
    "stride of a packed gradient": ("swiglu/cuda.cu", "a.dup) + row * a.grad_row", "a.dup) + row * a.n_cols"),
}
ASTRAY: Mutations = {
    "row mask of a tile": (
        "swiglu/cuda.cu",
        "    if (row >= a.n_rows) continue;\n    float g[L], dgate[L], dup[L];",
        "    float g[L], dgate[L], dup[L];",
    ),
}
RACES: Races = {
    "rows of two blocks": Race(
        "swiglu_bwd_kernel",
        "swiglu/cuda.cu",
        "static_cast<T*>(a.dgate) + row * a.grad_row + c",
        "static_cast<T*>(a.dgate) + row / 8 * a.grad_row + c",
        ("row / 8 * a.grad_row + c, dgate);", "row / 8 * a.grad_row + c, dgate);"),
        slow=True,
    ),
}


def calls(name: str) -> Calls:
    x, dy, packed = rand(6, 33), rand(6, 33, seed=1), rand(6, 66, seed=3)
    return {
        "swiglu_fwd": (SWIGLU_FWD[name], (x, dy, 0)),
        "swiglu_fwd packed": (SWIGLU_FWD[name], (packed, None, 1)),
        "swiglu_bwd": (SWIGLU_BWD[name], (dy, x, rand(33, seed=2).expand(6, 33), 2)),
        "swiglu_bwd packed": (SWIGLU_BWD[name], (dy, packed, None, 0)),
    }
