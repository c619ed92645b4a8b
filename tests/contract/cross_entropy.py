"""Data of cross_entropy for the tests that run on every op."""

import torch

from contract import DEVICE, Calls, Errors, Far, Mutations, Race, Races, rand
from fastgpt import ops
from fastgpt.ops.cross_entropy import CROSS_ENTROPY_BWD, CROSS_ENTROPY_FWD, CROSS_ENTROPY_FWD_BWD, SCALE_ROWS

RUN_SHAPE = (7, 61)
FAR: Far = {
    "cross_entropy": lambda x: ops.cross_entropy(x, torch.tensor([3, 0, 31]), reduction="none"),
}
ERRORS: Errors = [
    (lambda: ops.cross_entropy(rand(2, 3, 4), rand(2)), ValueError, r"logits has shape \(2, 3, 4\), expected \(N, V\)"),
    (lambda: ops.cross_entropy(rand(2, 5), rand(2)), TypeError, "target is torch.float32, expected torch.int64"),
    (lambda: ops.cross_entropy(rand(2, 5), torch.tensor([1, 2, 3])), ValueError, r"target has shape \(3,\)"),
    (lambda: ops.cross_entropy(rand(2, 5), torch.tensor([1, 5])), ValueError, r"target\[1\] is 5, expected 0 to 4"),
    (lambda: ops.cross_entropy(rand(2, 5), torch.tensor([0, 1]), vocab_size=6), ValueError, "vocab_size is 6"),
    (lambda: ops.cross_entropy(rand(2, 5), torch.tensor([0, 1]), reduction="max"), ValueError, "reduction is 'max'"),
    (lambda: ops.cross_entropy(rand(2, 5), torch.tensor([0, 1]), label_smoothing=2.0), ValueError, "label_smoothing"),
]
MUTATIONS: Mutations = {
    "shifted tail": ("core/cuda/vec.cuh", "return i < head ? i : i + n_packs", "return i < head ? i : i + 1 + n_packs"),
}
RACES: Races = {
    "barrier before gradients over logits": Race(
        "cross_entropy_fwd_bwd_kernel",
        "cross_entropy/cuda.cu",
        "  __syncthreads();\n  return Stats{",
        "  return Stats{",
        ("row.z(widen(row.logits[row.target]));", "store_any(row.dlogits + c, x, aligned);"),
    ),
    "piece that another thread requested": Race(
        "cross_entropy_held_kernel",
        "cross_entropy/cuda.cu",
        "held[u] = arriving[i];",
        "held[u] = arriving[i ^ 1];",
        ("ptx::cp_async_16(to + step * 16, packs + step, 16);", "held[u] = arriving[i ^ 1];"),
    ),
    "barrier of a maximum": Race(
        "cross_entropy_fwd_kernel",
        "core/cuda/reduce.cuh",
        "  __syncthreads();\n  return warp_max(",
        "  return warp_max(",
        (
            "  if (lane == 0) mine[threadIdx.x / 32] = v;\n  return warp_max(",
            "return warp_max(lane < n_warps ? mine[lane] : mine[0]);",
        ),
        slow=True,
    ),
}


def calls(name: str) -> Calls:
    x, t, options = rand(6, 33), torch.arange(6, device=DEVICE), (-100, 0.1, 1e-3, 0.0, 30)
    stats = torch.stack((x.amax(-1), (x - x.amax(-1, keepdim=True)).exp().sum(-1)))
    return {
        "cross_entropy_fwd": (CROSS_ENTROPY_FWD[name], (x, t, None, *options)),
        "cross_entropy_bwd": (CROSS_ENTROPY_BWD[name], (rand(6), x, t, stats, None, *options)),
        "cross_entropy_bwd of a mean": (CROSS_ENTROPY_BWD[name], (rand(1), x, t, stats, None, *options)),
        "cross_entropy_fwd_bwd": (CROSS_ENTROPY_FWD_BWD[name], (x.clone(), rand(6), t, None, rand(1), *options)),
        "scale_rows": (SCALE_ROWS[name], (x.clone(), rand(6))),
    }
