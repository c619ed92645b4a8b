"""Attention of one or a few queries over a KV cache, split over the keys (Flash-Decoding, Dao et al. 2023).

    z = scale * q k^T, softcapped: softcap * tanh(z / softcap); masked entries -inf; causal at the bottom right
    per split of the keys: top = max z, total = sum exp(z - top), acc = sum exp(z - top) v
    out = sum_splits w acc / sum_splits w total, w = exp(top - max top); a query without any key gives 0

The result is that of `attention` with causal=True. `attention` has a block of the GPU for each tile of queries of a
head, so one query over a long cache would use a few of its multiprocessors. Here, the keys of a head are split over
blocks, and a second kernel adds the splits. The number of splits follows from shapes alone, so a call can be recorded
in a CUDA graph and replayed with other lengths. The query heads that share a key head are computed together, from keys
that are loaded once.

With `pages`, the cache is a pool of pages and the keys of a row lie in any of them (PagedAttention, Kwon et al. 2023).
Kernels read each key where it is. They visit the keys in the order of a cache that is not paged, so a table for S keys
gives the bits of a cache of S keys.

Saved for backward: nothing. The op is for inference and has no gradient.

Determinism: bitwise, for any number of threads and any lengths of the other rows. The splits of a CPU have a fixed
number of keys; those of a GPU depend on the shapes and on its number of multiprocessors.

Limits: heads wider than 256 columns run on the formula on a GPU. Many queries are slower here than in `attention`:
each group of queries reads all its keys. The Triton kernel copies a pool, in each call, unless the rows of a head start
at multiples of 16 bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt.core.backend import Cell, register, select
from fastgpt.ops._attention import attention_ref
from fastgpt.ops._common import autocast, define, flop_formula, needs_grad, relative_error
from fastgpt.ops.attention import MAX_HEAD_DIM, check_heads, check_keys, check_values

PAGE_SIZES = tuple(2**n for n in range(3, 9))  # slots of a page
_OPTIONS = "Tensor? kv_lens, Tensor? kv_start, float scale, int window, float softcap"


def _fake(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)


ATTENTION_DECODE_FWD = define(
    "attention_decode", "attention_decode_fwd", f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> Tensor", _fake
)
ATTENTION_DECODE_PAGED_FWD = define(
    "attention_decode",
    "attention_decode_paged_fwd",
    f"(Tensor q, Tensor k, Tensor v, Tensor pages, {_OPTIONS}) -> Tensor",
    _fake,
)


def _flop(q: Any, k: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    b, t, h, d = q
    return int(4 * b * t * h * k[1] * d)


def _paged_flop(q: Any, k: Any, v: Any, pages: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    return pages[1] * _flop(q, k)


flop_formula("attention_decode_fwd", _flop)
flop_formula("attention_decode_paged_fwd", _paged_flop)


def gather_pages(pool: Tensor, pages: Tensor) -> Tensor:
    """Return the keys or values of each row, (B, S, Hkv, D), from a pool (n_pages, page_size, Hkv, D)."""
    return pool[pages.long()].flatten(1, 2)


def attention_decode_ref(q: Tensor, k: Tensor, v: Tensor, *, pages: Tensor | None = None, **o: Any) -> Tensor:
    """Return the formula in fp32 (fp64 for fp64 input); options as in `attention_decode`."""
    if pages is not None:
        k, v = gather_pages(k, pages), gather_pages(v, pages)
    none: dict[str, Any] = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "doc_ids"))
    return attention_ref(q, k, v, causal=True, dropout_p=0.0, **none, **o)[0]


def pack(q: Tensor, o: dict[str, Any]) -> tuple[Any, ...]:
    """Return the options of the raw op: two optional tensors, int32, then three numbers."""
    index = [None if o[n] is None else o[n].int().contiguous() for n in ("kv_lens", "kv_start")]
    return (
        *index,
        float(q.shape[-1] ** -0.5 if o["scale"] is None else o["scale"]),
        o["window"] or 0,
        float(o["softcap"]),
    )


def _check_pages(q: Tensor, k: Tensor, v: Tensor, pages: Any) -> int:
    """Raise unless k and v are a pool in q's dtype and pages (B, n) has numbers of its pages. Return the keys of a
    row."""
    op = "attention_decode"
    check_heads(op, q, k, v, pool=True)
    if not isinstance(pages, Tensor) or pages.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: pages is {getattr(pages, 'dtype', pages)!r}, expected torch.int32 or torch.int64")
    if pages.dim() != 2 or pages.shape[0] != q.shape[0]:
        raise ValueError(f"{op}: pages has shape {tuple(pages.shape)}, expected ({q.shape[0]}, pages of a row)")
    if pages.device != q.device:
        raise ValueError(f"{op}: pages is on {pages.device}, expected {q.device}")
    if k.shape[1] not in PAGE_SIZES:
        raise ValueError(f"{op}: k has pages of {k.shape[1]} slots, expected one of {', '.join(map(str, PAGE_SIZES))}")
    check_values(op, "pages", pages, k.shape[0] - 1, rising=False)
    return pages.shape[1] * k.shape[1]


def _self_check(backend: str, device: torch.device) -> float:
    special: dict[str, Any] = {"window": 190, "softcap": 3.0, "scale": None}
    errors = []
    shapes = [
        (torch.float32, 2, 2, 40),
        *((torch.bfloat16, 1, h, d) for h, d in ((1, 64), (4, 64), (4, 128), (8, 128))),
    ]
    for dtype, t, h, d in shapes:  # the CUDA kernel has instances for 1, up to 4 and up to 8 queries of a key head
        q, k, v = (torch.randn(2, n, g, d, device=device).to(dtype) for n, g in ((t, 2 * h), (300, 2), (300, 2)))
        o = special | {
            "kv_lens": torch.tensor([300, 170], device=device),
            "kv_start": torch.tensor([130, 3], device=device),
        }
        exact = attention_decode_ref(q.double(), k.double(), v.double(), **o)
        pool = [x.reshape(150, 4, 2, d).flip(0) for x in (k, v)]
        pages = torch.arange(149, -1, -1, dtype=torch.int32, device=device).view(2, 75)
        got = [
            ATTENTION_DECODE_FWD[backend](q, k, v, *pack(q, o)),
            ATTENTION_DECODE_PAGED_FWD[backend](q, *pool, pages, *pack(q, o)),
        ]
        errors.append(relative_error(got, [exact, exact]))
    return max(errors)


register(
    "attention_decode",
    _self_check,
    cuda=Cell(max_dim=MAX_HEAD_DIM),
    triton=Cell(max_dim=MAX_HEAD_DIM),
    cpu=Cell(),
)


def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lens: Tensor | None = None,
    *,
    pages: Tensor | None = None,
    kv_start: Tensor | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Return attention(q, k, v, causal=True, ...) for a few queries and many keys, without a gradient.

    Args:
        q: (B, T, H, D), any strides; T of 1 to about 8.
        k, v: (B, S, Hkv, D) in q's dtype, Hkv dividing H; any strides. Keys that no query sees may be uninitialised.
            With `pages`, one layer of a pool: (n_pages, page_size, Hkv, D), page_size 8, 16, 32, 64, 128 or 256.
        kv_lens: (B,) int, end of the valid keys of each row; default S. It excludes keys and shifts nothing: query i
            sees keys up to i + S - T. A single query sees all keys below kv_lens.
        pages: (B, max_pages) int32 (int64 is converted), the block table of a paged cache: key s of row b is in slot
            s % page_size of page pages[b, s // page_size], and S is max_pages * page_size. Rows may share pages. Every
            number must be in [0, n_pages), also those of pages that no query sees; such pages are not read. On a GPU,
            where values are not checked (FASTGPT_CHECK=1 does), a row that sees a page outside the pool becomes NaN.
        kv_start: (B,) int, start of the valid keys of each row; default 0. For a single query at the end of a cache of
            length L and a window of W keys, it is max(0, L - W).
        window: keys that a query sees, counted back from i + S - T and including it; None is all.
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
        scale: default 1 / sqrt(D).

    Returns:
        (B, T, H, D) in q's dtype. A query without any key gives 0.

    Raises:
        ValueError, TypeError: with the argument, the value received and the value expected; ValueError if a gradient
            is needed.

    Example:
        >>> import torch
        >>> from fastgpt import ops
        >>> q, k, v = torch.randn(2, 1, 4, 32), torch.randn(2, 100, 2, 32), torch.randn(2, 100, 2, 32)
        >>> ops.attention_decode(q, k, v, torch.tensor([100, 7])).shape
        torch.Size([2, 1, 4, 32])
        >>> k, v = torch.randn(12, 16, 2, 32), torch.randn(12, 16, 2, 32)  # a pool: 12 pages of 16 slots
        >>> pages = torch.tensor([[3, 0, 7], [5, 0, 0]], dtype=torch.int32)
        >>> ops.attention_decode(q, k, v, torch.tensor([40, 7]), pages=pages).shape
        torch.Size([2, 1, 4, 32])

    Source: Flash-Decoding (Dao, Haziza, Massa, Sizov 2023, crfm.stanford.edu/2023/10/12/flashdecoding.html); paged
    cache: PagedAttention (Kwon et al. 2023, arXiv:2309.06180).
    """
    if all(isinstance(t, Tensor) and t.is_floating_point() for t in (q, k, v)):
        q, k, v = (t for t in autocast(q, k, v) if t is not None)
    options = {"kv_lens": kv_lens, "kv_start": kv_start, "window": window, "softcap": softcap, "scale": scale}
    if pages is None:
        check_heads("attention_decode", q, k, v)
    n_keys = k.shape[1] if pages is None else _check_pages(q, k, v, pages)
    check_keys("attention_decode", q, n_keys, options)
    if needs_grad(q, k, v):
        raise ValueError(
            "attention_decode: an input requires a gradient, expected none: use attention or torch.no_grad()"
        )
    dim = 1 + MAX_HEAD_DIM if q.shape[3] > MAX_HEAD_DIM else 0  # a plain number: a compiler may have symbolic shapes
    backend = select("attention_decode", q, dim=dim)
    if backend == "torch":
        return attention_decode_ref(q, k, v, pages=pages, **options)
    if pages is None:
        out: Tensor = ATTENTION_DECODE_FWD[backend](q, k, v, *pack(q, options))
    else:
        out = ATTENTION_DECODE_PAGED_FWD[backend](q, k, v, pages.int().contiguous(), *pack(q, options))
    return out
