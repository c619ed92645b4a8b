"""Data of embedding for the tests that run on every op."""

import torch

from contract import Errors, Far, Mutations, Race, Races, rand
from fastgpt import ops

IDS = torch.tensor([[2, 0, 2, 1]])
RUN_SHAPE = (500, 70, 128, 3, 67)
FAR: Far = {
    "embedding": lambda x: ops.embedding(IDS, x, x[:, :], positions=IDS),
}
ERRORS: Errors = [
    (lambda: ops.embedding(torch.tensor([9]), rand(4, 2)), ValueError, "ids reach from 9 to 9, expected 0 to 3"),
]
MUTATIONS: Mutations = {
    "barrier behind a tile's plan": ("embedding/cuda.cu", "  __syncthreads();\n", ""),
    "run cut in its middle": ("embedding/cuda.cu", "key == first && !(all_one && i + 1 > kTile / 2)", "key == first"),
    "one level of partials": (
        "embedding/cuda.cu",
        "while (tiles_of(level.n_rows) > 1)",
        "if (tiles_of(level.n_rows) > 1)",
    ),
}
ASTRAY: Mutations = {
    "token bound": ("embedding/cuda.cu", "  if (i >= a.n_tokens) return;\n", ""),
    "table bound": ("embedding/cuda.cu", "(i >= n || key == nothing)", "(i >= n)"),
}
RACES: Races = {
    "barrier before the rows of a tile": Race(
        "embedding_bwd_kernel",
        "embedding/cuda.cu",
        "  __syncthreads();\n  const int c = (blockIdx.y",
        "  const int c = (blockIdx.y",
        ("    goes_to[i] = sum_goes_to(", "const int to = goes_to[first + u];"),
    ),
}
