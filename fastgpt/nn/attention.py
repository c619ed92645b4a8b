"""Rotary embedding and multi-head attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.core.fallback import leave_to_torch
from fastgpt.ops._rope_scaling import rope_frequencies, rope_magnitude


class RotaryEmbedding(nn.Module):
    """Rotary position embedding of queries and keys, with tables that stay in fp32 whatever the model is cast to.

    Args:
        rotary_dim: number of leading columns of each head that are rotated.
        max_positions: number of rows of the tables.
        theta: base of the frequencies.
        scaling: as in fastgpt.ops.rope.rope_frequencies.
        interleaved: rotate pairs (2i, 2i + 1) as in GPT-J instead of (i, i + rotary_dim / 2) as in Llama and NeoX.

    Attributes:
        cos: (max_positions, rotary_dim / 2) fp32; not in the state_dict. Tables of dynamic scaling are those of a
            sequence of the length that `adapt` got last.
        sin: as cos.

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
        self._length = 0  # positions that dynamic scaling stretches the tables for
        self.register_buffer("cos", torch.empty(0, device=device), persistent=False)
        self.register_buffer("sin", torch.empty(0, device=device), persistent=False)
        self._fill()

    def _fill(self) -> None:
        rows = torch.arange(self.max_positions, dtype=torch.float64, device="cpu")
        angle = torch.outer(rows, rope_frequencies(self.rotary_dim, self.theta, self.scaling, self._length))
        device, size = self.cos.device, rope_magnitude(self.scaling)
        self.cos, self.sin = (size * angle.cos()).float().to(device), (size * angle.sin()).float().to(device)

    def adapt(self, length: int, positions: Tensor | None = None) -> None:
        """Set the tables for a sequence of `length` positions, or as many as `positions` reach.

        Only dynamic scaling past the original context depends on it. There, a device waits for `positions`.
        """
        if self.scaling is None or self.scaling["rope_type"] != "dynamic":
            return
        original = self.scaling["original_max_position_embeddings"]
        if self.max_positions <= original:
            return
        length = length if positions is None else int(positions.max()) + 1
        length = 0 if length <= original else length
        if length != self._length:
            self._length = length
            self._fill()

    def extend(self, max_positions: int) -> None:
        """Enlarge the tables to `max_positions` rows; the rows they have do not change."""
        if max_positions > self.max_positions:
            self.max_positions = max_positions
            self._fill()

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryEmbedding:
        super()._apply(fn, recurse)  # moves the tables; a cast or a pass through the meta device loses their values
        self._fill()
        return self

    def forward(self, q: Tensor, k: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.adapt(q.shape[1], positions)
        return ops.rope(q, k, self.cos, self.sin, interleaved=self.interleaved, positions=positions)

    def extra_repr(self) -> str:
        names = ("rotary_dim", "max_positions", "theta", "scaling", "interleaved")
        return ", ".join(f"{n}={getattr(self, n)!r}" for n in names)


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention without the matrix of attention weights; also exported as fastgpt.nn.Attention.

    The arguments of the constructor are those of torch.nn.MultiheadAttention. Keys: in_proj_weight (or q_proj_weight,
    k_proj_weight, v_proj_weight), in_proj_bias, out_proj.weight, out_proj.bias.

    The kernels run with need_weights=False and no mask, is_causal=True or a boolean key_padding_mask. With
    is_causal=True attn_mask is not read, as in PyTorch, and may be omitted. With a key_padding_mask the unmasked keys
    are moved to the front, which turns any mask into a length. Calls that need weights, other masks, bias_k and bias_v,
    or add_zero_attn fall back to PyTorch's module. If all keys of a query are masked, its output is the bias of
    out_proj, where PyTorch may return NaN.

    Returns:
        (output, None) as in PyTorch; (output, weights) where PyTorch's module runs.
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
    """Return which part of a call of nn.MultiheadAttention `m` the op does not cover, or None if it covers the call."""
    if need_weights:
        return "need_weights=True (pass need_weights=False if the weights are not used)"
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
        return "is_causal=True with different numbers of keys and queries"
    return None


def attend(m: Any, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, causal: bool) -> Tensor:
    """Return the input of out_proj of nn.MultiheadAttention `m`, in the layout of query.

    The projection is packed if query, key and value are one tensor.

    padding: (B, S) bool, True where a key is ignored; not supported with `causal`.
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
    """Project x and split it into heads: (B, T, C) or (T, B, C) or (T, C) -> (B, T, heads, D)."""
    y = F.linear(x[None] if x.dim() == 2 else x, weight, bias).unflatten(-1, (-1, m.head_dim))
    return y if batch_first else y.transpose(0, 1)


def _project(m: Any, query: Tensor, key: Tensor, value: Tensor, batch_first: bool) -> list[Tensor]:
    own = (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
    weights = own if m.in_proj_weight is None else m.in_proj_weight.chunk(3)
    biases = (None,) * 3 if m.in_proj_bias is None else m.in_proj_bias.chunk(3)
    return [_heads(m, x, w, b, batch_first) for x, w, b in zip((query, key, value), weights, biases)]


def _counted_first(k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys and values (B, S, H, D) with those that `mask` (B, S) excludes moved to the end, and counts (B,) of
    the others. Softmax does not depend on the order of keys, and the host reads no value of the mask."""
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :, None, None].expand_as(k)
    return k.gather(1, order), v.gather(1, order), (~mask).sum(1)


Attention = MultiheadAttention
