"""Data of rope for the tests that run on every op."""

import torch

from contract import Errors, Far, Mutations, heads, rand
from fastgpt import ops

COS, SIN = torch.rand(3, 4), torch.rand(3, 4)
RUN_SHAPE = (2, 33, 4, 1, 64, 32)
FAR: Far = {
    "rope": lambda x: ops.rope(heads(x, 4), heads(x, 4), COS, SIN),
}
ERRORS: Errors = [
    (lambda: ops.rope(rand(1, 3, 2, 4), rand(1, 3, 2, 6), rand(9, 2), rand(9, 2)), ValueError, r"rope: q .* and k"),
]
MUTATIONS: Mutations = {
    "heads side by side": (
        "rope/cuda.cu",
        "for (int first = threadIdx.y; first < n_heads;",
        "for (int first = 0; first < n_heads;",
    ),
    "sign of a turn": ("rope/cuda.cu", "a * cos[l] - b * s;", "a * cos[l] + b * s;"),
}
ASTRAY: Mutations = {
    "head bound": ("rope/cuda.cu", "return h < n_heads && (h", "return h <= n_heads && (h"),
}
