"""Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762) with grouped heads, masks and softcap.

    z = scale * q k^T, softcapped: softcap * tanh(z / softcap); masked entries -inf
    out = softmax(z) v, lse = log sum exp(z); a row without any key gives out = 0, lse = -inf
    dz = p (keep / (1 - dropout_p) * dout v^T - rowsum(dout out) + dlse)
    dq = scale dz k,  dk = scale dz^T q,  dv = (keep / (1 - dropout_p) * p)^T dout

Kernels never hold the T x S matrix (FlashAttention-2, arXiv:2307.08691). `attention_qkv` takes one packed tensor and
returns one packed gradient, without a concatenation.

Saved for backward: q, k, v, out, lse. Backward recomputes p from lse.

Determinism: bitwise on fastgpt's kernels, dropout included. PyTorch's fused backward, which serves 16-bit calls first
on sm_90 and newer, is not; `deterministic=True` and torch.use_deterministic_algorithms exclude it.

`cuda:sm_90a` chooses kernels with TMA and wgmma for Hopper GPUs (FlashAttention-3, arXiv:2407.08608), forward and
backward, for bf16 and fp16, head dimensions of 64 and 128, causal order or none. They were tested in the host emulation
and have not run on a device, so they run only where `FASTGPT_KERNELS`, `--kernels` or `use` name them.

Limits: heads wider than 256 columns run on PyTorch's op or the formula on a GPU; the CUDA kernels take 16 bits only.
There is no additive mask or bias. First derivatives only.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastgpt.core.backend import Cell, checks_values, register, select
from fastgpt.ops._attention import attention_ref, attention_torch, sdpa_can
from fastgpt.ops._attention_sm90 import SM90, or_plain
from fastgpt.ops._common import (
    autocast,
    check_float,
    check_like,
    declare,
    define,
    fp64_results,
    needs_grad,
    relative_error,
)

MAX_HEAD_DIM = 256  # of the Triton and CUDA kernels: a wider tile does not fit
_OPTIONS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? doc_ids, Tensor? kv_lens, Tensor? kv_start, Tensor? rng, "
    "bool causal, float scale, int window, float softcap, float dropout_p"
)


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    b, t, h, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((b, h, t), dtype=torch.float32)


def _bwd_fake(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _qkv_bwd_fake(dout: Tensor, qkv: Tensor, *rest: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


_FWD_SCHEMA = f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)"
ATTENTION_FWD = define("attention", "attention_fwd", _FWD_SCHEMA, _fwd_fake)
_BWD_SCHEMA = (
    f"(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor)"
)
ATTENTION_BWD = define("attention", "attention_bwd", _BWD_SCHEMA, _bwd_fake)
_QKV_BWD_SCHEMA = (
    f"(Tensor dout, Tensor qkv, Tensor out, Tensor lse, {_OPTIONS}, int n_heads, int n_kv_heads) -> Tensor"
)
ATTENTION_QKV_BWD = define("attention", "attention_qkv_bwd", _QKV_BWD_SCHEMA, _qkv_bwd_fake)
ATTENTION_FWD[SM90] = declare("attention_fwd_sm90.cuda", _FWD_SCHEMA, _fwd_fake)
ATTENTION_BWD[SM90] = declare("attention_bwd_sm90.cuda", _BWD_SCHEMA, _bwd_fake)
ATTENTION_QKV_BWD[SM90] = declare("attention_qkv_bwd_sm90.cuda", _QKV_BWD_SCHEMA, _qkv_bwd_fake)


class AttentionFn(torch.autograd.Function):
    """Autograd over the raw ops: (backend, q, k, v, packed options) -> (out, lse)."""

    @staticmethod
    def forward(ctx: Any, backend: str, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        out, lse = ATTENTION_FWD[backend](q, k, v, *options)
        ctx.backend, ctx.numbers = backend, options[6:]
        ctx.save_for_backward(q, k, v, out, lse, *options[:6])
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        grads = ATTENTION_BWD[ctx.backend](dout, dlse, q, k, v, out, lse, *tensors, *ctx.numbers)
        return None, *grads, *[None] * (len(tensors) + len(ctx.numbers))


class AttentionQkvFn(torch.autograd.Function):
    """Autograd over the raw ops for one packed tensor: (backend, qkv, heads, packed options) -> out."""

    @staticmethod
    def forward(ctx: Any, backend: str, qkv: Tensor, heads: tuple[int, int], *options: Any) -> Tensor:
        ctx.backend, ctx.heads, ctx.numbers = backend, heads, options[6:]
        out, lse = ATTENTION_FWD[backend](*qkv.split([heads[0], heads[1], heads[1]], dim=2), *options)
        ctx.save_for_backward(qkv, out, lse, *options[:6])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse, *tensors = ctx.saved_tensors
        dqkv = ATTENTION_QKV_BWD[ctx.backend](dout, qkv, out, lse, *tensors, *ctx.numbers, *ctx.heads)
        return None, dqkv, None, *[None] * (len(tensors) + len(ctx.numbers))


def check_index(op: str, name: str, x: Tensor | None, shape: tuple[int, ...] | None, like: Tensor) -> None:
    """Raise unless x is None or an integer tensor of this shape (None: (n + 1,)) on the device of `like`."""
    if x is None:
        return
    if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} is {getattr(x, 'dtype', x)!r}, expected torch.int32 or torch.int64")
    if (x.dim() != 1 or x.shape[0] < 1) if shape is None else tuple(x.shape) != tuple(shape):
        raise ValueError(
            f"{op}: {name} has shape {tuple(x.shape)}, expected {'(n + 1,)' if shape is None else tuple(shape)}"
        )
    if x.device != like.device:
        raise ValueError(f"{op}: {name} is on {x.device}, expected {like.device}")


def check_values(op: str, name: str, x: Tensor | None, top: int, rising: bool) -> None:
    """Raise unless all values are in [0, top] and, if `rising`, start at 0 and never fall.

    Values are checked on a CPU; on a GPU only with FASTGPT_CHECK=1.
    """
    if x is None or not checks_values(x) or x.numel() == 0:
        return
    low, high = (int(t) for t in x.aminmax())
    if low < 0 or high > top:
        raise ValueError(f"{op}: {name} reach from {low} to {high}, expected 0 to {top}")
    if rising and (int(x[0]) != 0 or bool((x[1:] < x[:-1]).any())):
        raise ValueError(f"{op}: {name} are {x.tolist()[:8]}, expected starts from 0 on that never fall")


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor, pool: bool = False) -> None:
    """Raise unless q is (B, T, H, D), and k and v are (B, S, Hkv, D) of its dtype and device, with Hkv dividing H.
    With `pool`, k and v are pages of a cache, (n_pages, page_size, Hkv, D)."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_float(op, name, x)
        if x.dim() != 4:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected (B, T, H, D)")
    b, _, h, d = q.shape
    if not (pool or k.shape[0] == b) or k.shape[3] != d:
        wanted = "n_pages, page_size" if pool else f"{b}, S"
        raise ValueError(f"{op}: k has shape {tuple(k.shape)}, expected ({wanted}, Hkv, {d}) as q")
    check_like(op, "k", k, tuple(k.shape), q, (q.dtype,), "as q")
    check_like(op, "v", v, tuple(k.shape), q, (q.dtype,), "as k")
    if k.shape[2] == 0 or h % k.shape[2]:
        raise ValueError(f"{op}: q has {h} heads, expected a multiple of k's {k.shape[2]}")


def check_keys(op: str, q: Tensor, n_keys: int, o: dict[str, Any]) -> None:
    """Raise unless window, softcap, kv_lens and kv_start are valid for q and this number of keys in a row."""
    if o["window"] is not None and o["window"] < 1:
        raise ValueError(f"{op}: window is {o['window']}, expected at least 1 key (the query's own)")
    for name in ("kv_lens", "kv_start"):
        check_index(op, name, o[name], (q.shape[0],), q)
        check_values(op, name, o[name], n_keys, rising=False)
    if o["softcap"] < 0:
        raise ValueError(f"{op}: softcap is {o['softcap']}, expected 0 (off) or more")


def _check(q: Tensor, k: Tensor, v: Tensor, o: dict[str, Any]) -> None:
    check_heads("attention", q, k, v)
    (b, t), s = q.shape[:2], k.shape[1]
    cu_q, cu_k = o["cu_seqlens_q"], o["cu_seqlens_k"]
    if (cu_q is None) != (cu_k is None):
        raise ValueError("attention: got only one of cu_seqlens_q and cu_seqlens_k, expected both or neither")
    for name, total, shape in (("cu_seqlens_q", t, None), ("cu_seqlens_k", s, None if cu_q is None else cu_q.shape)):
        check_index("attention", name, o[name], shape, q)
        check_values("attention", name, o[name], total, rising=True)
    if cu_q is not None and (b != 1 or any(o[n] is not None for n in ("doc_ids", "kv_lens", "kv_start"))):
        raise ValueError(
            f"attention: got cu_seqlens with a batch of {b} or with doc_ids, kv_lens or kv_start, "
            "expected packed (1, total, H, D) alone"
        )
    if o["doc_ids"] is not None and t != s:
        raise ValueError(f"attention: got doc_ids with {t} queries and {s} keys, expected equal numbers")
    check_index("attention", "doc_ids", o["doc_ids"], (b, t), q)
    check_keys("attention", q, s, o)
    if not 0.0 <= o["dropout_p"] < 1.0:
        raise ValueError(f"attention: dropout_p is {o['dropout_p']}, expected 0 to less than 1")


def pack(q: Tensor, o: dict[str, Any]) -> tuple[Any, ...]:
    """Return the options of the raw ops: six optional tensors (indices int32; rng is drawn here), then five numbers."""
    names = ("cu_seqlens_q", "cu_seqlens_k", "doc_ids", "kv_lens", "kv_start")
    index = [None if o[n] is None else o[n].int().contiguous() for n in names]
    # drawn from the generator of the device: its state and captured graphs then include the draw
    rng = torch.randint(0, 2**63 - 1, (2,), device=q.device) if o["dropout_p"] > 0 else None
    scale = float(q.shape[-1] ** -0.5 if o["scale"] is None else o["scale"])
    numbers = (o["causal"], scale, o["window"] or 0, float(o["softcap"]), float(o["dropout_p"]))
    return *index, rng, *numbers


def _self_check(backend: str, device: torch.device) -> float:
    special = {"window": 40, "softcap": 3.0}
    if backend not in ("cuda", SM90):
        return _error(backend, device, torch.float32, 67, 32, special)
    plain = [_error(backend, device, torch.bfloat16, 200, dim, {}) for dim in (64, 128)]  # separate kernels
    return max(*plain) if backend == SM90 else max(_error(backend, device, torch.float16, 67, 32, special), *plain)


def _error(backend: str, device: torch.device, dtype: torch.dtype, t: int, dim: int, special: dict[str, Any]) -> float:
    q, k, v, dout = (torch.randn(2, t, h, dim, device=device).to(dtype) for h in (4, 2, 2, 4))
    names = ("cu_seqlens_q", "cu_seqlens_k", "doc_ids", "kv_lens", "kv_start")
    o: dict[str, Any] = dict.fromkeys(names) | {"scale": None, "window": None, "softcap": 0.0, "dropout_p": 0.0}
    o |= special
    exact, *grads = fp64_results(lambda *qkv: attention_ref(*qkv, causal=True, **o)[0], (q, k, v), (dout,))
    options = pack(q, {**o, "causal": True})
    out, lse = ATTENTION_FWD[backend](q, k, v, *options)
    got = [out, *ATTENTION_BWD[backend](dout, None, q, k, v, out, lse, *options)]
    packed = ATTENTION_QKV_BWD[backend](dout, torch.cat((q, k, v), 2), out, lse, *options, 4, 2)
    return relative_error([*got, packed], [exact, *grads, torch.cat(grads, 2)])


register(
    "attention",
    _self_check,
    triton=Cell(max_dim=MAX_HEAD_DIM),
    cpu=Cell(),
    cuda=Cell(dtypes=(torch.bfloat16, torch.float16), max_dim=MAX_HEAD_DIM),
)

_DEFAULTS: dict[str, Any] = dict.fromkeys(
    ("scale", "window", "cu_seqlens_q", "cu_seqlens_k", "doc_ids", "kv_lens", "kv_start")
) | {"causal": False, "softcap": 0.0, "dropout_p": 0.0}


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    doc_ids: Tensor | None = None,
    kv_lens: Tensor | None = None,
    kv_start: Tensor | None = None,
    deterministic: bool = False,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    doc_ids: Tensor | None = None,
    kv_lens: Tensor | None = None,
    kv_start: Tensor | None = None,
    deterministic: bool = False,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    doc_ids: Tensor | None = None,
    kv_lens: Tensor | None = None,
    kv_start: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return softmax(scale q k^T + mask) v.

    Args:
        q: (B, T, H, D), any strides.
        k, v: (B, S, Hkv, D) in q's dtype, Hkv dividing H; any strides.
        causal: query i sees keys up to i + S - T (aligned at the bottom right).
        scale: default 1 / sqrt(D).
        window: keys that a query sees, counted back from its own and including it; None is all.
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
        dropout_p: probability that an attention weight is dropped, 0 to less than 1.
        cu_seqlens_q, cu_seqlens_k: (n + 1,) int32 starts of packed sequences; then B = 1 and T, S are totals, and
            causal and window align each sequence at its own bottom right.
        doc_ids: (B, T) int; a query sees keys of its own document only.
        kv_lens: (B,) end of the valid keys of each sequence (padding on the right). It excludes keys and shifts
            nothing: causal and window still count from i + S - T. In a KV cache whose sequences have different lengths
            L, one query each needs kv_lens alone, with a window of W keys also kv_start = max(0, L - W) in its place.
            For several queries, view the cache as one row (1, B S, Hkv, D) and pass cu_seqlens, with a sequence without
            queries over each gap: cu_seqlens_q = (0, T, T, 2 T, 2 T, ...), cu_seqlens_k = (0, L0, S, S + L1, 2 S, ...).
        kv_start: (B,) start of the valid keys of each sequence (padding on the left); it shifts nothing either.
        deterministic: exclude PyTorch's fused backward, which is not deterministic; fastgpt's kernels always are.
        return_lse: also return log-sum-exp (B, H, T), fp32, differentiable.

    Returns:
        (B, T, H, D) in q's dtype; with `return_lse` the pair (out, lse). A query without any key gives 0, and lse
        -inf.

    Raises:
        ValueError, TypeError: with the argument, the value received and the value expected.

    Example:
        >>> import torch
        >>> from fastgpt import ops
        >>> q, k, v = torch.randn(1, 16, 4, 32), torch.randn(1, 16, 2, 32), torch.randn(1, 16, 2, 32)
        >>> ops.attention(q, k, v, causal=True, window=8).shape
        torch.Size([1, 16, 4, 32])

    Source: Vaswani et al. 2017 (arXiv:1706.03762), FlashAttention-2 (arXiv:2307.08691).
    """
    options: dict[str, Any] = dict(
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        dropout_p=dropout_p,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        doc_ids=doc_ids,
        kv_lens=kv_lens,
        kv_start=kv_start,
    )
    if all(isinstance(t, Tensor) and t.is_floating_point() for t in (q, k, v)):
        q, k, v = (t for t in autocast(q, k, v) if t is not None)
    _check(q, k, v, options)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    backend = _select(q, k, {**options, "return_lse": return_lse}, deterministic)
    if backend == "torch":
        return attention_torch(q, k, v, {**options, "return_lse": return_lse}, deterministic)
    packed = pack(q, options)
    if needs_grad(q, k, v):
        out, lse = AttentionFn.apply(backend, q, k, v, *packed)
    else:
        out, lse = ATTENTION_FWD[backend](q, k, v, *packed)
    return (out, lse) if return_lse else out


def _select(q: Tensor, k: Tensor, o: dict[str, Any], deterministic: bool) -> str:
    """Return the backend of a call.

    If torch is selected because it measured fastest or is the prior, but would compute this call by the formula or with
    another dropout mask, the prior order of the kernels applies. The kernel for sm_90a, where a caller chose it, leaves
    calls with options to the plain one.
    """
    dim = 1 + MAX_HEAD_DIM if q.shape[3] > MAX_HEAD_DIM else 0  # a plain number: a compiler may have symbolic shapes
    backend = select("attention", q, dim=dim)
    if backend == "torch" and (o["dropout_p"] > 0 or not sdpa_can(q, k, o, deterministic)):
        backend = select("attention", q, measured=False, dim=dim)
    return or_plain(backend, q, o)


def attention_qkv(qkv: Tensor, *, n_heads: int, n_kv_heads: int, **options: Any) -> Tensor:
    """Compute `attention` over one packed tensor. Its gradient is packed too, without a split and a concatenation.

    Args:
        qkv: (B, T, n_heads + 2 n_kv_heads, D): query heads, key heads, value heads; any strides.
        n_heads: query heads.
        n_kv_heads: key heads, and as many value heads; divides n_heads.
        options: as in `attention`, except return_lse.

    Returns:
        (B, T, n_heads, D) in qkv's dtype.

    Raises:
        ValueError, TypeError: with the argument, the value received and the value expected.

    Example:
        >>> import torch
        >>> from fastgpt import ops
        >>> qkv = torch.randn(1, 16, 4 + 2 * 2, 32, requires_grad=True)
        >>> ops.attention_qkv(qkv, n_heads=4, n_kv_heads=2, causal=True).sum().backward()
        >>> qkv.grad.shape
        torch.Size([1, 16, 8, 32])
    """
    check_float("attention", "qkv", qkv)
    heads = n_heads + 2 * n_kv_heads
    if qkv.dim() != 4 or qkv.shape[2] != heads:
        raise ValueError(f"attention: qkv has shape {tuple(qkv.shape)}, expected (B, T, {heads}, D)")
    qkv = autocast(qkv)[0]  # type: ignore[assignment]
    q, k, v = qkv.split([n_heads, n_kv_heads, n_kv_heads], dim=2)
    deterministic = options.get("deterministic", False) or torch.are_deterministic_algorithms_enabled()
    backend = _select(q, k, {**_DEFAULTS, "return_lse": False, **options}, deterministic)
    if backend == "torch" or not needs_grad(qkv):
        out: Tensor = attention(q, k, v, **options)
        return out
    full = {**_DEFAULTS, **{k: v for k, v in options.items() if k != "deterministic"}}
    if full.keys() != _DEFAULTS.keys():
        raise TypeError(f"attention: unexpected options {sorted(full.keys() - _DEFAULTS.keys())}")
    _check(q, k, v, full)
    packed: Tensor = AttentionQkvFn.apply(backend, qkv, (n_heads, n_kv_heads), *pack(qkv, full))
    return packed
