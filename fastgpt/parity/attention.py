"""Parity of attention, over three tensors and over one packed tensor.

The baseline is F.scaled_dot_product_attention with a mask tensor. For what it does not support (softcap, dropout with a
known key, lse) the baseline is an eager composition: products, softmax and dropout, each rounded to the dtype of the
case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.ops._attention import attention_mask, attention_ref, dropout_keep
from fastgpt.parity.inputs import Inputs
from fastgpt.parity.rule import Case, Outputs, Subject, Variant

DEFAULTS: dict[str, Any] = dict.fromkeys(
    ("scale", "window", "cu_seqlens_q", "cu_seqlens_k", "doc_ids", "kv_lens", "kv_start")
) | {"causal": False, "softcap": 0.0, "dropout_p": 0.0}
SEED = 11  # of the draw of the dropout key


def _index_tensors(o: dict[str, Any], b: int, t: int, s: int) -> dict[str, Tensor]:
    """Build the index tensors that the flags of a case request."""
    found: dict[str, Tensor] = {}
    if o.pop("docs", False):
        found["doc_ids"] = torch.arange(t).mul(3).div(t, rounding_mode="floor").repeat(b, 1) + torch.arange(b)[:, None]
    if o.pop("lens", False):  # from all keys down to none
        found["kv_lens"] = torch.arange(b).mul(-(s // 2)).add(s).clamp(min=0).int()
    if o.pop("start", False):
        found["kv_start"] = torch.arange(b).mul(2).add(1)
    if o.pop("segments", False):  # empty, one token, long; then rows after the last sequence
        found["cu_seqlens_q"] = torch.tensor([0, 0, 1, max(1, t - 2)], dtype=torch.int32)
        found["cu_seqlens_k"] = torch.tensor([0, 1, 3, max(3, s - 1)], dtype=torch.int32)
    return found


def run_attention(case: Case, fn: Callable[..., Any], inputs: Inputs) -> Outputs:
    """Run `fn` and return its output and gradients; shape: B, T, S, H, Hkv, D."""
    b, t, s, h, g, d = case.shape
    o = dict(case.options)
    o |= {name: inputs.place(index) for name, index in _index_tensors(o, b, t, s).items()}
    packed, spread = o.pop("packed", False), o.pop("spread", 1.0)
    if packed:
        leaves = {"dqkv": inputs.leaf((b, t, h + 2 * g, d), case.dtype, spread)}
        o |= {"n_heads": h, "n_kv_heads": g}
    else:
        leaves = {"dq": inputs.leaf((b, t, h, d), case.dtype, spread)}
        leaves |= {name: inputs.leaf((b, s, g, d), case.dtype, spread) for name in ("dk", "dv")}
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(SEED)
        out = fn(*leaves.values(), **o)
    outputs = {"out": out[0], "lse": out[1]} if o.get("return_lse") else {"out": out}
    dtypes = {"out": case.dtype, "lse": torch.float32}
    torch.autograd.backward(
        list(outputs.values()), [inputs.grad(tuple(x.shape), dtypes[n]).to(x.dtype) for n, x in outputs.items()]
    )
    return {**outputs, **{name: x.grad for name, x in leaves.items() if x.grad is not None}}


def _either(fn: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """Wrap `fn(q, k, v, rng, options)` -> (out, lse) as both public forms, with the dropout key that these draw."""

    def call(*tensors: Tensor, return_lse: bool = False, n_heads: int = 0, n_kv_heads: int = 0, **o: Any) -> Any:
        q, k, v = tensors[0].split([n_heads, n_kv_heads, n_kv_heads], 2) if n_heads else tensors
        rng = torch.randint(0, 2**63 - 1, (2,), device=q.device)
        out, lse = fn(q, k, v, rng, {**DEFAULTS, **o})
        return (out, lse) if return_lse else out

    return call


def _ours(*tensors: Tensor, **o: Any) -> Any:
    return ops.attention_qkv(*tensors, **o) if "n_heads" in o else ops.attention(*tensors, **o)


def _reference(q: Tensor, k: Tensor, v: Tensor, rng: Tensor, o: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return attention_ref(q, k, v, rng=rng, **o)


def _torch(q: Tensor, k: Tensor, v: Tensor, rng: Tensor, o: dict[str, Any]) -> tuple[Tensor, Tensor]:
    eager = _eager(q, k, v, rng, o)
    return eager if o["dropout_p"] > 0 else (baseline(q, k, v, o), eager[1])


def baseline(q: Tensor, k: Tensor, v: Tensor, o: dict[str, Any]) -> Tensor:
    """Return the output of PyTorch's attention without dropout, by the rule in the head of this file."""
    if o["softcap"] > 0 or not k.shape[1]:
        return _eager(q, k, v, None, o)[0]
    qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))
    mask = attention_mask(q, k, o)
    out = F.scaled_dot_product_attention(qh, kh, vh, attn_mask=mask, scale=o["scale"], enable_gqa=True)
    return out.transpose(1, 2)


def _eager(q: Tensor, k: Tensor, v: Tensor, rng: Tensor | None, o: dict[str, Any]) -> tuple[Tensor, Tensor]:
    group = q.shape[2] // k.shape[2]
    qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))
    kh, vh = kh.repeat_interleave(group, 1), vh.repeat_interleave(group, 1)
    z = qh @ kh.transpose(-1, -2) * (q.shape[-1] ** -0.5 if o["scale"] is None else o["scale"])
    z = o["softcap"] * torch.tanh(z / o["softcap"]) if o["softcap"] > 0 else z
    mask = attention_mask(q, k, o)
    none = None if mask is None else ~mask.any(-1, keepdim=True)
    z = z if mask is None or none is None else z.masked_fill(~mask, -torch.inf).masked_fill(none, 0.0)
    p, lse = z.softmax(-1), z.float().logsumexp(-1)
    if none is not None:
        p, lse = p.masked_fill(none, 0.0), lse.masked_fill(none[..., 0], -torch.inf)
    if o["dropout_p"] > 0 and rng is not None:
        p = p * dropout_keep(rng, (*z.shape[:3], z.shape[3]), o["dropout_p"]) / (1 - o["dropout_p"])
    return (p @ vh).transpose(1, 2), lse


SINGLE: tuple[dict[str, Any], ...] = (
    {"causal": True},
    {"window": 4},
    {"softcap": 2.0},
    {"scale": 0.3},
    {"dropout_p": 0.3},
    {"return_lse": True},
    {"docs": True},
    {"lens": True},
    {"start": True},
    {"segments": True},
    {"packed": True},
)
KEYLESS = ("lens", "start", "segments")  # rows without a key: their lse is -inf and has no gradient


def _fits(o: dict[str, Any]) -> bool:
    """Return whether these options can be combined."""
    alone = "segments" in o and any(n in o for n in ("docs", "lens", "start"))
    return not alone and not ("return_lse" in o and ("packed" in o or any(n in o for n in KEYLESS)))


def _bases(dtype: torch.dtype) -> Iterator[Variant]:
    yield (2, 5, 5, 2, 1, 16), {"causal": True}
    yield (2, 5, 5, 2, 1, 16), {"causal": True, "packed": True}


def _variants(dtype: torch.dtype) -> Iterator[Variant]:
    pairs = [{**a, **b} for i, a in enumerate(SINGLE) for b in SINGLE[i + 1 :]]
    everything = {"causal": True, "window": 4, "softcap": 2.0, "dropout_p": 0.3, "scale": 0.3}
    for o in ({}, *SINGLE, *pairs, everything, {**everything, "segments": True}, {**everything, "docs": True}):
        if _fits(o):
            square = "docs" in o or "packed" in o
            yield (1 if "segments" in o else 2, 9, 9 if square else 11, 2, 1, 16), o
    for d in (1, 8, 40, 64, 80, 96, 128, 256):
        yield (1, 33, 35, 2, 2, d), {"causal": True}  # with few values the largest error depends on luck
    for d in (64, 128, 256):  # several tiles, with the code of every option
        yield (1, 70, 75, 2, 1, d), {"causal": True, "window": 30, "softcap": 2.0, "dropout_p": 0.3}
        yield (1, 70, 70, 1, 1, d), {"docs": True, "start": True}
    for t, s in ((1, 1), (1, 70), (70, 70), (3, 130), (130, 3), (65, 64), (0, 5), (5, 0)):
        for causal in (False, True):
            yield (1, t, s, 2, 1, 16), {"causal": causal}
    for d in (1, 16):  # one key, one query, one or two keys for each query
        yield (1, 33, 1, 2, 1, d), {}
        yield (1, 33, 2, 2, 1, d), {"causal": True}
        yield (1, 1, 33, 2, 1, d), {}
        yield (2, 33, 33, 2, 2, d), {"window": 1}
    yield (1, 33, 33, 2, 1, 1), {}
    yield (1, 130, 130, 1, 1, 32), {"causal": True, "window": 20, "docs": True}
    yield (1, 130, 130, 2, 1, 32), {"causal": True, "segments": True}
    yield (2, 70, 70, 4, 2, 16), {"causal": True, "packed": True}
    yield (0, 5, 5, 2, 1, 16), {}
    # 30 gives |z| of 1000. In fp32, softmax would then be exactly one key, and the gradients the rounding of dp - delta
    for spread in (1e-3, 2.0 if dtype == torch.float32 else 30.0):
        yield (1, 9, 11, 2, 1, 16), {"causal": True, "spread": spread}


SUBJECT = Subject(run_attention, _ours, _either(_torch), _either(_reference), _bases, _variants)
