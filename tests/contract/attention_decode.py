"""Data of attention_decode for the tests that run on every op."""

import torch

from contract import DEVICE, Calls, Errors, Far, Mutations, heads, rand
from fastgpt import ops
from fastgpt.ops.attention_decode import ATTENTION_DECODE_FWD

RUN_SHAPE = (1, 1, 1030, 8, 1, 16)


def calls(name: str) -> Calls:
    q, k, v = rand(2, 1, 4, 16), rand(2, 70, 2, 16, seed=1), rand(2, 70, 2, 16, seed=2)
    lens, start = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([70, 3], [5, 0]))
    return {
        "attention_decode_fwd": (ATTENTION_DECODE_FWD[name], (q, k, v, None, None, 0.25, 0, 0.0)),
        "attention_decode_fwd options": (ATTENTION_DECODE_FWD[name], (q, k, v, lens, start, 0.25, 40, 3.0)),
    }


def wrong(**o: object) -> object:
    return ops.attention_decode(rand(2, 1, 4, 16), rand(2, 9, 2, 16), rand(2, 9, 2, 16), **o)  # type: ignore[arg-type]


FAR: Far = {"attention_decode": lambda x: ops.attention_decode(*[heads(x.detach(), 2)] * 3)}
ERRORS: Errors = [
    (lambda: wrong(kv_lens=torch.tensor([9, 10])), ValueError, "attention_decode: kv_lens reach from 9 to 10"),
    (lambda: wrong(kv_lens=torch.tensor([9])), ValueError, r"attention_decode: kv_lens has shape \(1,\), expected"),
    (lambda: wrong(kv_start=torch.zeros(2)), TypeError, "attention_decode: kv_start is torch.float32"),
    (lambda: wrong(window=0), ValueError, "attention_decode: window is 0, expected at least 1 key"),
    (lambda: wrong(softcap=-1.0), ValueError, "attention_decode: softcap is -1.0"),
    (
        lambda: ops.attention_decode(*[rand(1, 1, 2, 16).requires_grad_()] * 3),
        ValueError,
        "attention_decode: an input requires a gradient",
    ),
]
MUTATIONS: Mutations = {
    "barrier before the warps are added": (
        "attention_decode/cuda.cu",
        "  __syncthreads();  // the sums of all warps are in shared memory\n",
        "",
    ),
    "factor of a split": ("attention_decode/cuda.cu", "sum += factors[s] * sums", "sum += sums"),
    "last key of a row": ("attention_decode/cuda.cu", "at >= end[r]) z[r][u]", "at > end[r]) z[r][u]"),
    "factor of the earlier sums": ("attention_decode/cuda.cu", "s.acc[r][e] *= shrink;", "s.acc[r][e] *= 1.0f;"),
}
ASTRAY: Mutations = {
    "last key": ("attention_decode/cuda.cu", "k >= low && k < high && column < dim", "k >= low && column < dim"),
}
