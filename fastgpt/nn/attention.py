"""Rotary embedding and multi-head attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.core.fallback import leave_to_torch
from fastgpt.ops.rope import rope_frequencies


class RotaryEmbedding(nn.Module):
    """Rotate queries and keys by position, from tables that stay fp32 whatever the model is cast to.

    Args:
        rotary_dim: leading columns of each head that rotate.
        max_positions: rows of the tables.
        theta: base of the frequencies.
        scaling: as in fastgpt.ops.rope.rope_frequencies.
        interleaved: pairs (2i, 2i + 1) as in GPT-J instead of (i, i + rotary_dim / 2) as in Llama and NeoX.

    Attributes:
        cos, sin: (max_positions, rotary_dim / 2) fp32; not in the state_dict.

    Shape: q (B, T, H, D), k (B, T, Hkv, D), positions (T,) or (B, T) int64, default 0, 1, 2, ... -> q and k rotated.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        rotary_dim: int,
        max_positions: int,
        *,
        theta: float = 10000.0,
        scaling: dict[str, Any] | None = None,
        interleaved: bool = False,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.rotary_dim, self.max_positions = rotary_dim, max_positions
        self.theta, self.scaling, self.interleaved = theta, scaling, interleaved
        self.register_buffer("cos", torch.empty(0, device=device), persistent=False)
        self.register_buffer("sin", torch.empty(0, device=device), persistent=False)
        self._fill()

    def _fill(self) -> None:
        rows = torch.arange(self.max_positions, dtype=torch.float64, device="cpu")
        angle = torch.outer(rows, rope_frequencies(self.rotary_dim, self.theta, self.scaling))
        device = self.cos.device
        self.cos, self.sin = angle.cos().float().to(device), angle.sin().float().to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryEmbedding:
        super()._apply(fn, recurse)  # moves; a cast or a way through the meta device would lose the values
        self._fill()
        return self

    def forward(self, q: Tensor, k: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.rope(q, k, self.cos, self.sin, interleaved=self.interleaved, positions=positions)

    def extra_repr(self) -> str:
        names = ("rotary_dim", "max_positions", "theta", "scaling", "interleaved")
        return ", ".join(f"{n}={getattr(self, n)!r}" for n in names)


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention without the matrix of weights; also as fastgpt.nn.Attention.

    The arguments of the constructor are those of torch.nn.MultiheadAttention. Keys: in_proj_weight (or q_proj_weight,
    k_proj_weight, v_proj_weight), in_proj_bias, out_proj.weight, out_proj.bias.

    The kernels serve need_weights=False without a mask, with is_causal=True (attn_mask is then not read, as in PyTorch,
    and may be left out), and with a boolean key_padding_mask: there the keys that count are moved to the front, so
    that any mask becomes a length. Weights, other masks, bias_k and bias_v, add_zero_attn go to torch's own. A
    query all of whose keys are masked gives out_proj's bias, where PyTorch may give NaN.

    Returns:
        (output, None) as PyTorch; (output, weights) from torch's own.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        why = uncovered(self, query, key, key_padding_mask, need_weights, attn_mask, is_causal)
        if why is not None:
            leave_to_torch("MultiheadAttention", why)
            masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return super().forward(query, key, value, *masks)
        return self.out_proj(attend(self, query, key, value, key_padding_mask, is_causal)), None


def uncovered(
    m: Any, query: Tensor, key: Tensor, padding: Tensor | None, need_weights: bool, mask: Tensor | None, causal: bool
) -> str | None:
    """What the op does not do of a call of nn.MultiheadAttention `m`; None where it does all."""
    if need_weights:
        return "need_weights=True (pass need_weights=False where the weights are not used)"
    if m.bias_k is not None or m.add_zero_attn:
        return "add_bias_kv or add_zero_attn"
    if mask is not None and not causal:
        return "attn_mask without is_causal=True"
    if padding is not None and (causal or padding.dtype != torch.bool):
        return f"key_padding_mask {'with is_causal=True' if causal else f'of {padding.dtype}'}"
    length = 1 if m.batch_first and query.dim() == 3 else 0
    if query.dim() not in (2, 3) or query.is_nested:
        return "nested tensors or inputs of other than 2 or 3 dimensions"
    rows = key.shape[:-1] if m.batch_first or key.dim() == 2 else (key.shape[1], key.shape[0])
    if padding is not None and padding.shape != torch.Size(rows):
        return f"key_padding_mask of shape {tuple(padding.shape)} with keys {tuple(key.shape)}"
    if causal and query.shape[length] != key.shape[length]:
        return "is_causal=True with other numbers of keys than of queries"
    return None


def attend(m: Any, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, causal: bool) -> Tensor:
    """What an nn.MultiheadAttention `m` gives its out_proj, laid out as query: packed where all three are one tensor.

    padding: (B, S) bool, True where a key does not count; not with `causal`.
    """
    lone = query.dim() == 2  # one sequence
    batch_first = m.batch_first or lone
    options: dict[str, Any] = dict(causal=causal, dropout_p=m.dropout if m.training else 0.0)
    if query is key and key is value and m.in_proj_weight is not None and padding is None:
        qkv = _heads(m, query, m.in_proj_weight, m.in_proj_bias, batch_first)
        out = ops.attention_qkv(qkv, n_heads=m.num_heads, n_kv_heads=m.num_heads, **options)
    else:
        q, k, v = _project(m, query, key, value, batch_first)
        if padding is not None:
            k, v, options["kv_lens"] = _counted_first(k, v, padding.reshape(k.shape[:2]))
        out = ops.attention(q, k, v, **options)
    out = out.flatten(2)  # (B, T, C)
    return out.squeeze(0) if lone else out if batch_first else out.transpose(0, 1)


def _heads(m: Any, x: Tensor, weight: Tensor, bias: Tensor | None, batch_first: bool) -> Tensor:
    """x projected: (B, T, C) or (T, B, C) or (T, C) -> (B, T, heads, D)."""
    y = F.linear(x[None] if x.dim() == 2 else x, weight, bias).unflatten(-1, (-1, m.head_dim))
    return y if batch_first else y.transpose(0, 1)


def _project(m: Any, query: Tensor, key: Tensor, value: Tensor, batch_first: bool) -> list[Tensor]:
    own = (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
    weights = own if m.in_proj_weight is None else m.in_proj_weight.chunk(3)
    biases = (None,) * 3 if m.in_proj_bias is None else m.in_proj_bias.chunk(3)
    return [_heads(m, x, w, b, batch_first) for x, w, b in zip((query, key, value), weights, biases)]


def _counted_first(k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (B, S, H, D) with those that `mask` (B, S) leaves out moved behind the others, and the others'
    numbers (B,): softmax does not mind the order, and no value of the mask is read by the host."""
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :, None, None].expand_as(k)
    return k.gather(1, order), v.gather(1, order), (~mask).sum(1)


Attention = MultiheadAttention
