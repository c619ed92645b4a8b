"""A block of models/gpt.py: causal self-attention and an MLP, each with its norm.

The residual add is fused into the norm after it: a block returns (branch, residual, bias), whose sum is x. The bias is
that of the linear layer that ends the branch. The norm adds it too, and its backward sums the bias's gradient in the
pass that computes the branch's gradient, instead of reading that again.
Dims: B, T, C width, H query heads, G key/value heads, D head, F MLP, S keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.core.backend import select
from fastgpt.models.cache import Cache
from fastgpt.models.config import GATED, ModelConfig
from fastgpt.models.recompute import MadeAgain
from fastgpt.models.tree import TokenTree
from fastgpt.nn import LayerNorm, Linear, RMSNorm, RotaryEmbedding
from fastgpt.nn._hooks import fusable
from fastgpt.nn.lora import FrozenLinear, LoraLinear
from fastgpt.nn.lora_rows import RowsLora
from fastgpt.nn.mlp import product_and_bias
from fastgpt.nn.narrow import NarrowLinear

FRESH = (Linear, NarrowLinear, LoraLinear, FrozenLinear, RowsLora)  # layers whose output belongs to the caller


class Pass(NamedTuple):
    """Inputs that all blocks of a forward pass share."""

    rotary: RotaryEmbedding | None
    positions: Tensor | None  # (T,) or (B, T)
    doc_ids: Tensor | None  # (B, T)
    cache: Cache | None
    again: MadeAgain | None  # records what backward recomputes
    tree: TokenTree | None = None
    epilogues: bool = False  # whether fastgpt's own matrix products do what passes around PyTorch's would

    def note(self, t: Tensor, make: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """Return t, which backward may recompute as make(*inputs)."""
        return t if self.again is None else self.again.note(t, make, *inputs)


def make_module(kind: type[nn.Module], *args: Any, **options: Any) -> Any:
    """Create a module without drawing initial values, which init_weights sets; the global generator stays unused.

    torch.nn.utils.skip_init draws them on the meta device, which imports torch._dynamo: most of a second, and 50 MB.
    """
    undrawn = type(kind.__name__, (kind,), {"reset_parameters": lambda module: None})
    module = undrawn(*args, device=torch.get_default_device(), **options)
    module.__class__ = kind
    return module


def norm_of(c: ModelConfig, size: int) -> LayerNorm | RMSNorm:
    if c.norm == "layer":
        return LayerNorm(size, c.norm_eps, bias=c.norm_bias)
    return RMSNorm(size, c.norm_eps, weight_offset=c.norm_offset)


class SelfAttention(nn.Module):
    """Causal self-attention over one packed projection (query heads, key heads, value heads)."""

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.window, self.scale, self.softcap = layer, c.window_of(layer), c.score_scale, c.attn_softcap
        self.n_heads, self.kv_heads, self.d_head = c.n_heads, c.kv_heads, c.d_head
        self.attn_dropout, self.resid_dropout = c.attn_dropout, c.resid_dropout
        self.qkv = make_module(Linear, c.width, (c.n_heads + 2 * c.kv_heads) * c.d_head, bias=c.qkv_bias)
        self.proj = make_module(Linear, c.n_heads * c.d_head, c.width, bias=c.proj_bias)
        self.q_norm = norm_of(c, c.d_head) if c.qk_norm else None
        self.k_norm = norm_of(c, c.d_head) if c.qk_norm else None

    def _rotate(self, qkv: Tensor, run: Pass) -> Tensor:
        """Rotate the query and key heads of qkv (B, T, H + 2G, D) by position."""
        rotary = run.rotary
        if rotary is None:
            return qkv
        fresh = any(fusable(self.qkv, kind) for kind in FRESH)  # the op overwrites what qkv returned
        if fresh and fusable(rotary, RotaryEmbedding):
            options: dict[str, Any] = dict(n_heads=self.n_heads, n_kv_heads=self.kv_heads, positions=run.positions)
            return ops.rope_qkv(qkv, rotary.cos, rotary.sin, interleaved=rotary.interleaved, **options)
        q, k, v = qkv.split([self.n_heads, self.kv_heads, self.kv_heads], dim=2)
        return torch.cat((*rotary(q, k, run.positions), v), dim=2)

    def _heads(self, qkv: Tensor, run: Pass) -> tuple[Tensor, Tensor, Tensor]:
        """Split (B, T, H + 2G, D) into q (B, T, H, D), k and v (B, T, G, D): normalised and rotated."""
        sizes = [self.n_heads, self.kv_heads, self.kv_heads]
        if self.q_norm is None or self.k_norm is None:
            q, k, v = self._rotate(qkv, run).split(sizes, dim=2)
        else:
            q, k, v = qkv.split(sizes, dim=2)
            q, k = self.q_norm(q), self.k_norm(k)
            if run.rotary is not None:
                q, k = run.rotary(q, k, run.positions)
        return q, k, v

    def _in_parts(self, x: Tensor, run: Pass) -> bool:
        """Return whether q, k and v come from an op that takes their gradients apart: with a plain layer, where nothing
        else needs them packed, and before PyTorch's attention. The gradient of fastgpt's is packed."""
        alone = run.tree is None and run.cache is None and run.rotary is None and self.q_norm is None
        plain = run.epilogues and alone and fusable(self.qkv, Linear)
        return plain and select("attention", x) == "torch" and select("linear_qkv", x) != "torch"

    def _parts(self, x: Tensor) -> list[Tensor]:
        """Return q (B, T, H, D), k and v (B, T, G, D)."""
        parts = ops.linear_qkv(x, self.qkv.weight, self.qkv.bias, n_kv=self.kv_heads * self.d_head)
        return [part.view(*part.shape[:2], -1, self.d_head) for part in parts]

    def _options(self, t: int, run: Pass) -> dict[str, Any]:
        """Return the options of attention over t tokens without a cache."""
        window = None if self.window is None or self.window >= t else self.window
        return dict(
            scale=self.scale,
            softcap=self.softcap,
            dropout_p=self.attn_dropout if self.training else 0.0,
            causal=t > 1,
            window=window,
            doc_ids=run.doc_ids,
        )

    def _mix(self, x: Tensor, run: Pass) -> Tensor:
        """Return the input of `proj`, (B, T, H D)."""
        b, t, _ = x.shape
        if self._in_parts(x, run):
            y: Tensor = ops.attention(*self._parts(x), **self._options(t, run))
            return y.reshape(b, t, -1)
        qkv = self.qkv(x).view(b, t, -1, self.d_head)
        options: dict[str, Any] = dict(scale=self.scale, softcap=self.softcap)
        if run.tree is not None:
            y = run.tree.attend(self.layer, *self._heads(qkv, run), self.window, **options)
        elif run.cache is not None:
            options["dropout_p"] = self.attn_dropout if self.training else 0.0
            y = run.cache.attend(self.layer, *self._heads(qkv, run), self.window, **options)
        elif self.q_norm is None:
            heads: dict[str, Any] = dict(n_heads=self.n_heads, n_kv_heads=self.kv_heads)
            y = ops.attention_qkv(self._rotate(qkv, run), **heads, **self._options(t, run))
        else:
            y = ops.attention(*self._heads(qkv, run), **self._options(t, run))
        return y.reshape(b, t, -1)

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        return dropout(self.proj(self._mix(x, run)), self.resid_dropout, self.training)

    def product(self, x: Tensor, run: Pass) -> tuple[Tensor, Tensor | None]:
        """Return what `forward` does without the bias of `proj`, and this bias."""
        return product_and_bias(self.proj, self._mix(x, run))


class FeedForward(nn.Module):
    """MLP: down(activation(up(x))); for gated activations `up` is packed, gate first."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.activation, self.resid_dropout = c.activation, c.resid_dropout
        self.up = make_module(Linear, c.width, c.d_mlp * (2 if c.activation in GATED else 1), bias=c.mlp_bias)
        self.down = make_module(Linear, c.d_mlp, c.width, bias=c.mlp_bias)
        self.approximate = "tanh" if c.activation == "gelu_tanh" else "none"

    def _in_epilogues(self, x: Tensor, run: Pass) -> bool:
        """Return whether a kernel computes the activation in the epilogue of a product: with plain layers on both
        sides."""
        wanted = run.epilogues and self.activation in ("gelu", "gelu_tanh") and select("gelu_mlp", x) != "torch"
        return wanted and fusable(self.up, Linear) and fusable(self.down, Linear)

    def _whole(self, x: Tensor, bias: Tensor | None, run: Pass) -> Tensor:
        """Return down(activation(up(x))) with this bias of `down`, from one op."""
        options: dict[str, Any] = dict(approximate=self.approximate, recompute=run.again is not None)
        return ops.gelu_mlp(x, self.up.weight, self.up.bias, self.down.weight, bias, **options)

    def _activate(self, x: Tensor, run: Pass) -> Tensor:
        """Return the input of `down`, (B, T, F)."""
        if self.activation in GATED:
            u = self.up(x)  # (B, T, 2F)
            gate = partial(ops.swiglu, activation=GATED[self.activation])
            return run.note(gate(u), gate, u)
        if self.activation == "relu2":
            return F.relu(self.up(x)).square()  # fastgpt.ops has this only with a gate
        u, bias = product_and_bias(self.up, x)
        gelu = partial(ops.bias_gelu, approximate=self.approximate)
        return run.note(gelu(u, bias), gelu, u, bias)

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        whole = self._in_epilogues(x, run)
        y = self._whole(x, self.down.bias, run) if whole else self.down(self._activate(x, run))
        return dropout(y, self.resid_dropout, self.training)

    def product(self, x: Tensor, run: Pass) -> tuple[Tensor, Tensor | None]:
        """Return what `forward` does without the bias of `down`, and this bias."""
        if self._in_epilogues(x, run):
            return self._whole(x, None, run), self.down.bias
        return product_and_bias(self.down, self._activate(x, run))


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    return F.dropout(x, p) if training and p > 0 else x


class Block(nn.Module):
    """Attention and MLP with their norms: (branch, residual or None, bias or None) -> the same, which add up to x."""

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.post, self.parallel = c.norm_placement == "post", c.parallel != "none"
        self.norm1 = norm_of(c, c.width)
        self.attn = SelfAttention(c, layer)
        self.norm2 = norm_of(c, c.width) if c.parallel != "shared" else None
        self.mlp = FeedForward(c)

    def forward(
        self, x: Tensor, residual: Tensor | None, bias: Tensor | None, run: Pass
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.post and self.norm2 is not None:
            a, bias = branch(self.attn, x, run)
            x, _ = normalise(self.norm1, a, x, bias)
            a, bias = branch(self.mlp, x, run)
            x, _ = normalise(self.norm2, a, x, bias)
            return x, None, None
        h, residual = add_norm(self.norm1, x, residual, bias, run)
        if self.parallel:
            a = self.attn(h, run)
            h = h if self.norm2 is None else add_norm(self.norm2, residual, None, None, run)[0]
            return a + self.mlp(h, run), residual, None
        a, bias = branch(self.attn, h, run)
        h, residual = add_norm(self.norm2, a, residual, bias, run)
        if not fusable(self, Block):  # FSDP frees a block's parameters after its forward
            return self.mlp(h, run), residual, None
        a, bias = branch(self.mlp, h, run)
        return a, residual, bias


def branch(m: Any, x: Tensor, run: Pass) -> tuple[Tensor, Tensor | None]:
    """Return m(x, run) without the bias of its last layer, and this bias for the next norm to add.

    The bias is None if it has been added: by a branch or a layer that was replaced or has hooks, or before dropout.
    """
    fits = fusable(m, SelfAttention) or fusable(m, FeedForward)
    if not fits or (m.training and m.resid_dropout > 0):
        return m(x, run), None
    return m.product(x, run)  # type: ignore[no-any-return]


def normalise(norm: Any, x: Tensor, residual: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (norm(s), s) of s = x + bias + residual, computed in one op unless the norm was replaced or has hooks."""
    if bias is not None and not (fusable(norm, LayerNorm) or fusable(norm, RMSNorm)):
        x, bias = x + bias, None
    if residual is None:
        return norm(x), x
    return norm(x, residual) if bias is None else norm(x, residual, bias)  # type: ignore[no-any-return]


def add_norm(norm: Any, x: Tensor, residual: Tensor | None, bias: Tensor | None, run: Pass) -> tuple[Tensor, Tensor]:
    """Return (norm(s), s) of s = x + bias + residual; backward may recompute norm(s) from s."""
    y, total = normalise(norm, x, residual, bias)
    return run.note(y, norm, total), total
