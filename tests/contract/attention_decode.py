"""Data of attention_decode for the tests that run on every op."""

import torch
from torch import Tensor

from contract import DEVICE, Calls, Errors, Far, Mutations, Race, Races, heads, rand
from fastgpt import ops
from fastgpt.ops.attention_decode import ATTENTION_DECODE_FWD, ATTENTION_DECODE_PAGED_FWD

RUN_SHAPE = (1, 1, 1030, 8, 1, 16)
RACES: Races = {
    "barrier before the sums of all warps": Race(
        "attention_decode_fwd_kernel",
        "attention_decode/cuda.cu",
        "  __syncthreads();  // the sums of all warps are in shared memory\n",
        "",
        ("if (lane == 0) tops[warp][r] = s.top[r],", "for (int w = 1; w < kWarps; ++w) top = fmaxf(top, tops[w][r]);"),
        slow=True,
    ),
    "factors behind the barrier that others rely on": Race(
        "attention_decode_fwd_add_kernel",
        "attention_decode/cuda.cu",
        "  factors[split] = factor;\n  const float total = row_sum(own_total * factor, scratch[1]);",
        "  const float total = row_sum(own_total * factor, scratch[1]);\n  factors[split] = factor;",
        ("  factors[split] = factor;", "if (factors[s] != 0.0f)"),
        slow=True,
    ),
}


def calls(name: str) -> Calls:
    q, k, v = rand(2, 1, 4, 16), rand(2, 70, 2, 16, seed=1), rand(2, 70, 2, 16, seed=2)
    lens, start = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([70, 3], [5, 0]))
    pool = [rand(11, 16, 2, 16, seed=n) for n in (1, 2)]
    pages = torch.arange(10, -1, -1, dtype=torch.int32, device=DEVICE)[:10].view(2, 5)
    return {
        "attention_decode_paged_fwd": (ATTENTION_DECODE_PAGED_FWD[name], (q, *pool, pages, None, None, 0.25, 0, 0.0)),
        "attention_decode_paged_fwd options": (
            ATTENTION_DECODE_PAGED_FWD[name],
            (q, *pool, pages, lens, start, 0.25, 40, 3.0),
        ),
        "attention_decode_fwd": (ATTENTION_DECODE_FWD[name], (q, k, v, None, None, 0.25, 0, 0.0)),
        "attention_decode_fwd options": (ATTENTION_DECODE_FWD[name], (q, k, v, lens, start, 0.25, 40, 3.0)),
    }


def wrong(**o: object) -> object:
    return ops.attention_decode(rand(2, 1, 4, 16), rand(2, 9, 2, 16), rand(2, 9, 2, 16), **o)  # type: ignore[arg-type]


def paged(pages: object = None, slots: int = 16, dim: int = 16, **o: object) -> object:
    pages = torch.zeros(2, 3, dtype=torch.int32, device=DEVICE) if pages is None else pages
    return ops.attention_decode(rand(2, 1, 4, 16), *[rand(5, slots, 2, dim)] * 2, pages=pages, **o)  # type: ignore[arg-type]


def far_pages(x: Tensor) -> Tensor:
    """Attend to 3 pages (8, 1, 4) that are as far from each other as the rows of x (3, 32)."""
    pool, pages = x.detach().unflatten(1, (8, 1, 4)), torch.tensor([[2, 0, 1]], dtype=torch.int32)
    return ops.attention_decode(pool[:1], pool, pool, pages=pages)


FAR: Far = {
    "attention_decode": lambda x: ops.attention_decode(*[heads(x.detach(), 2)] * 3),
    "attention_decode pages": far_pages,
}
ERRORS: Errors = [
    (
        lambda: paged(torch.tensor([[0, 1], [4, 5]])),
        ValueError,
        "attention_decode: pages reach from 0 to 5, expected 0 to 4",
    ),
    (lambda: paged(torch.tensor([[0], [-1]])), ValueError, "attention_decode: pages reach from -1 to 0"),
    (lambda: paged(torch.zeros(2, 3)), TypeError, "attention_decode: pages is torch.float32"),
    (lambda: paged([[0], [0]]), TypeError, "attention_decode: pages is"),
    (lambda: paged(torch.zeros(3, 2).int()), ValueError, r"attention_decode: pages has shape \(3, 2\), expected \(2, "),
    (lambda: paged(slots=12), ValueError, "attention_decode: k has pages of 12 slots, expected one of 8, 16"),
    (lambda: paged(dim=8), ValueError, r"k has shape \(5, 16, 2, 8\), expected \(n_pages, page_size, Hkv, 16\)"),
    (
        lambda: paged(kv_lens=torch.tensor([48, 49])),
        ValueError,
        "attention_decode: kv_lens reach from 48 to 49, expected 0",
    ),
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
    "page of a key": ("attention_decode/cuda.cu", "table[k >> a.page_bits]", "table[0]"),
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
    "last key": ("attention_decode/cuda.cu", "k >= low && k < high ? k * s.row", "k >= low ? k * s.row"),
}
