"""Data of adamw for the tests that run on every op."""

import torch

from contract import DEVICE, Calls, Errors, Mutations, Race, Races, race_of_a_sum, rand
from fastgpt.ops.adamw import ADAMW_PREPARE, ADAMW_UPDATE, PARTIALS
from fastgpt.optim import AdamW

RUN_SHAPE = (70001,)
ERRORS: Errors = [
    (lambda: AdamW([torch.nn.Parameter(rand(2))], amsgrad=True), ValueError, "amsgrad=True is not supported"),
    (lambda: AdamW([torch.nn.Parameter(rand(2))], master="bf16"), ValueError, "master is 'bf16'"),
    (lambda: AdamW([torch.nn.Parameter(rand(2))], max_norm=0.0), ValueError, "max_norm is 0.0"),
]
MUTATIONS: Mutations = {
    "barrier behind a broadcast": ("adamw/cuda.cu", "begin == 0, sum);\n  __syncthreads();", "begin == 0, sum);"),
}
RACES: Races = {
    "barrier before the values of a step": Race(
        "adamw_update_kernel",
        "adamw/cuda.cu",
        "  __syncthreads();\n  const Step step = shared;",
        "  const Step step = shared;",
        ("const Step step = shared;", "if (threadIdx.x == 0) shared = make_step("),
        slow=True,
    ),
    "barrier of a sum": race_of_a_sum("adamw_prepare_kernel"),
}


def calls(name: str) -> Calls:
    p, m, v = [rand(5, 3), rand(4)], [rand(5, 3), rand(4)], [rand(5, 3).abs(), rand(4).abs()]
    steps, partials = torch.ones(2, device=DEVICE), torch.ones(PARTIALS, device=DEVICE)
    group = ([0, 0], torch.full((1,), 1e-3, device=DEVICE), [0.9], [0.999], [1e-8], [0.01])
    tail = (partials, 1.0, None, None, torch.zeros(1, device=DEVICE), False, 0)
    return {
        "adamw_prepare": (ADAMW_PREPARE[name], (p, steps, [0, 1], partials, 0, True)),
        "adamw_update": (ADAMW_UPDATE[name], (p, [rand(5, 3), rand(4)], m, v, [], steps, [0, 1], *group, *tail)),
    }
