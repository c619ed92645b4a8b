"""Data of linear_divergence for the tests that run on every op."""

import torch

from contract import DEVICE, Calls, Errors, Far, Mutations, Race, Races, rand
from fastgpt import ops
from fastgpt.ops._linear_divergence import LINEAR_DIVERGENCE_FWD
from fastgpt.ops.divergence import LINEAR_DIVERGENCE_ROWS

WEIGHT, X = torch.rand(7, 32), torch.rand(3, 32)
RUN_SHAPE = (13, 16, 61)
FAR: Far = {
    "linear_divergence": lambda x: ops.linear_divergence(
        x, WEIGHT.to(x.dtype), X.to(x.dtype), WEIGHT.to(x.dtype), reduction="none", chunk=2
    ),
    "linear_divergence teacher": lambda x: ops.linear_divergence(
        X.to(x.dtype), WEIGHT.to(x.dtype), x, WEIGHT.to(x.dtype), reduction="none", kind="jsd"
    ),
}
ERRORS: Errors = [
    (lambda: ops.linear_divergence(X, WEIGHT, X, WEIGHT, kind="kl"), ValueError, "kind is 'kl', expected 'forward_kl'"),
]
MUTATIONS: Mutations = {
    "teacher's row a column off": (
        "linear_divergence/cuda.cu",
        "y[l] = widen(teacher[c + l])",
        "y[l] = widen(teacher[c + l + 1])",
    ),
}
RACES: Races = {
    "scratch of two reductions": Race(
        "linear_divergence_rows_kernel",
        "linear_divergence/cuda.cu",
        "sum = row_sum(sum * exp_of<T>(max - shift(top)), sums);",
        "sum = row_sum(sum * exp_of<T>(max - shift(top)), reinterpret_cast<double*>(maxima));",
        ("const float top = row_max(max, maxima);", "sum = row_sum(sum * exp_of<T>(max - shift(top))"),
        slow=True,
    ),
}


def calls(name: str) -> Calls:
    z, z_t, target = rand(6, 33), rand(6, 40, seed=1), torch.arange(6, device=DEVICE)
    options = (2, 0.3, 1.5, 4, 30)
    heads = (
        rand(6, 8),
        rand(33, 8, seed=1),
        rand(33, seed=2),
        rand(6, 5, seed=3),
        rand(40, 5, seed=4),
        rand(40, seed=5),
    )
    plain = (rand(6, 8), rand(33, 8, seed=1), None, rand(6, 5, seed=3), rand(40, 5, seed=4), None)
    whole = LINEAR_DIVERGENCE_FWD[name]
    return {
        "linear_divergence_rows": (LINEAR_DIVERGENCE_ROWS[name], (z.clone(), rand(6), z_t, target, rand(6), *options)),
        "linear_divergence_rows of a mean": (
            LINEAR_DIVERGENCE_ROWS[name],
            (z.clone(), rand(6), z_t, None, rand(1), *options),
        ),
        "linear_divergence_fwd": (whole, (*heads, target, rand(6), *options, 4, [True, True, True])),
        "linear_divergence_fwd without gradients": (
            whole,
            (*plain, None, rand(1), *options, 4, [False, False, False]),
        ),
    }
