"""The shape of a model: a dataclass that checks its fields."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from fastgpt.core import options
from fastgpt.core.errors import UserError
from fastgpt.ops._rope_scaling import ROPE_TYPES

# model.activation -> ops.swiglu's activation
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu2": "relu2"}


def require(ok: bool, key: str, got: object, expected: str) -> None:
    if not ok:
        raise UserError(f"{key} is {got!r}, expected {expected}")


def require_sizes(config: Any, prefix: str = "") -> None:
    """Refuse infinite numbers, and whole numbers that torch cannot hold."""
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, int | float):
            require(abs(value) < 2**63, prefix + f.name, value, "a number below 2^63")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model; the defaults are GPT-2 124M.

    Attributes:
        n_layers: number of blocks.
        n_heads: query heads.
        n_kv_heads: key and value heads (grouped-query attention); null is n_heads.
        width: size C of the residual stream.
        head_dim: size D of a head; null is width / n_heads.
        mlp_width: hidden size of the MLP; null is 4 width, for gated activations 8/3 width rounded up to 256.
        vocab_size: number of tokens; null is that of the tokenizer or the data.
        vocab_multiple: embedding and head have vocab_size rows, rounded up to a multiple of this.
        block_size: number of positions (rows of the position table); null is the trainer's block_size.
        norm: kind of norm.
        norm_placement: pre as in GPT-2, post as in GPT-1 (without a final norm).
        norm_eps: added to the variance.
        norm_bias: whether LayerNorm has a bias.
        norm_offset: added to the weight of RMSNorm; Gemma uses 1.0.
        parallel: attention and MLP in parallel, after one norm (shared, GPT-J) or two (separate, GPT-NeoX).
        activation: activation of the MLP; swiglu, geglu, geglu_tanh and reglu2 are gated (silu, gelu, tanh's gelu or
            squared ReLU of the gate, times up).
        positions: learned table, rotary, or none.
        rotary_dim: leading columns of each head that rotate; null is all.
        rope_theta: base of the rotary frequencies.
        rope_interleaved: pairs (2i, 2i + 1) as in GPT-J instead of (i, i + rotary_dim / 2).
        rope_scaling: {rope_type: linear, factor: F}, or the rope_type dynamic, yarn or llama3 with the keys that
            transformers gives it (and original_max_position_embeddings).
        qk_norm: norm over each head of queries and keys.
        qkv_bias: bias of the query, key and value projection.
        proj_bias: bias of attention's output projection.
        mlp_bias: biases in the MLP.
        head_bias: bias of the logits.
        tied: whether the head shares the weight of the token embedding.
        window: keys that a query sees, counted back from its own; null is all; a list is repeated over the layers.
        attn_scale: factor of q k^T; null is 1 / sqrt(head_dim) (but see mup_base_head_dim), GPT-Neo uses 1.0.
        attn_softcap: attention scores become cap tanh(score / cap); 0 is off.
        logit_softcap: the same for the logits; 0 is off.
        embed_scale: factor of the token embeddings, in the dtype of the model; Gemma uses sqrt(width).
        embed_dropout: dropout of the embeddings.
        attn_dropout: dropout of the attention weights.
        resid_dropout: dropout of a block's output to the residual stream.
        init_std: standard deviation of initial weights; divided by sqrt(2 n_layers) where a block writes its output.
        mup_base_width: width whose learning rate, weight decay and init_std the settings are; initial values, learning
            rates and logits then scale with width / mup_base_width (µP, docs/tuning.md); null is no scaling.
        mup_base_head_dim: head_dim at mup_base_width: attn_scale is then sqrt(mup_base_head_dim) / head_dim; null is
            head_dim (wider models have more heads, not larger ones).
    """

    n_layers: int = 12
    n_heads: int = 12
    n_kv_heads: int | None = None
    width: int = 768
    head_dim: int | None = None
    mlp_width: int | None = None
    vocab_size: int | None = None
    vocab_multiple: int = 128
    block_size: int | None = None
    norm: Literal["layer", "rms"] = "layer"
    norm_placement: Literal["pre", "post"] = "pre"
    norm_eps: float = 1e-5
    norm_bias: bool = True
    norm_offset: float = 0.0
    parallel: Literal["none", "shared", "separate"] = "none"
    activation: Literal["gelu_tanh", "gelu", "relu2", "swiglu", "geglu", "geglu_tanh", "reglu2"] = "gelu_tanh"
    positions: Literal["learned", "rope", "none"] = "learned"
    rotary_dim: int | None = None
    rope_theta: float = 10000.0
    rope_interleaved: bool = False
    rope_scaling: dict[str, Any] | None = None
    qk_norm: bool = False
    qkv_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    head_bias: bool = False
    tied: bool = True
    window: int | list[int | None] | None = None
    attn_scale: float | None = None
    attn_softcap: float = 0.0
    logit_softcap: float = 0.0
    embed_scale: float = 1.0
    embed_dropout: float = 0.0
    attn_dropout: float = 0.0
    resid_dropout: float = 0.0
    init_std: float = 0.02
    mup_base_width: int | None = None
    mup_base_head_dim: int | None = None

    def __post_init__(self) -> None:
        for name in ("n_layers", "n_heads", "n_kv_heads", "width", "head_dim", "mlp_width", "vocab_size"):
            self._positive(name)
        for name in ("vocab_multiple", "block_size", "rope_theta", "norm_eps", "init_std"):
            self._positive(name)
        self._check_mup()
        heads, kv = self.n_heads, self.kv_heads
        require(
            self.head_dim is not None or self.width % heads == 0,
            "model.n_heads",
            heads,
            f"a divisor of model.width {self.width} (or model.head_dim set)",
        )
        require(heads % kv == 0, "model.n_kv_heads", kv, f"a divisor of model.n_heads {heads}")
        for name in ("embed_dropout", "attn_dropout", "resid_dropout"):
            rate = getattr(self, name)
            require(0.0 <= rate < 1.0, f"model.{name}", rate, "0 to less than 1")
        for name in ("attn_softcap", "logit_softcap"):
            cap = getattr(self, name)
            require(0.0 <= cap < math.inf, f"model.{name}", cap, "0 (off) or more")
        self._positive("attn_scale")
        self._positive("embed_scale")
        offset = self.norm_offset
        require(abs(offset) < math.inf, "model.norm_offset", offset, "a finite number")
        require(not offset or self.norm == "rms", "model.norm_offset", offset, "0 with model.norm layer")
        parallel_post = self.parallel != "none" and self.norm_placement == "post"
        require(not parallel_post, "model.parallel", self.parallel, "none with model.norm_placement post")
        self._check_rope()
        self._check_window()
        require_sizes(self, "model.")

    def _positive(self, name: str) -> None:
        value = getattr(self, name)
        require(value is None or 0 < value < math.inf, f"model.{name}", value, "more than 0")

    def _check_mup(self) -> None:
        self._positive("mup_base_width")
        self._positive("mup_base_head_dim")
        base, scale = self.mup_base_head_dim, self.attn_scale
        require(base is None or scale is None, "model.attn_scale", scale, "null with model.mup_base_head_dim")
        alone = base is not None and self.mup_base_width is None
        require(not alone, "model.mup_base_head_dim", base, "null without model.mup_base_width")

    def _check_rope(self) -> None:
        r, d = self.rotary, self.d_head
        if self.positions == "rope":
            key = "model.rotary_dim" if self.rotary_dim is not None else "model.head_dim"
            require(0 < r <= d and r % 2 == 0, key, r, f"an even number from 2 to the head dimension {d}")
        if self.rope_scaling is None:
            return
        kind = self.rope_scaling.get("rope_type")
        require(kind in ROPE_TYPES, "model.rope_scaling.rope_type", kind, " or ".join(ROPE_TYPES))
        need, may = ROPE_TYPES[str(kind)]
        keys = set(self.rope_scaling) - {"rope_type"}
        known = need <= keys <= need | may
        optional = f" (and optionally {', '.join(sorted(may))})" if may else ""
        expected = f"the keys {', '.join(sorted(need))}{optional} in addition to rope_type"
        require(known, "model.rope_scaling", sorted(keys), expected)
        for name in sorted(keys - {"truncate"}):
            value = self.rope_scaling[name]
            ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
            require(ok, f"model.rope_scaling.{name}", value, "a number more than 0")
        truncate = self.rope_scaling.get("truncate", True)
        require(isinstance(truncate, bool), "model.rope_scaling.truncate", truncate, "true or false")
        require(kind != "dynamic" or r > 2, "model.rotary_dim", r, "more than 2 with dynamic scaling")

    def _check_window(self) -> None:
        if not isinstance(self.window, list):
            self._positive("window")
            return
        ok = 1 <= len(self.window) <= self.n_layers and all(w is None or w >= 1 for w in self.window)
        require(ok, "model.window", self.window, f"1 to {self.n_layers} (model.n_layers) entries, each null or above 0")

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def d_head(self) -> int:
        """Size D of a head."""
        return self.width // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def rotary(self) -> int:
        """Columns of a head that rotate."""
        return self.d_head if self.rotary_dim is None else self.rotary_dim

    @property
    def d_mlp(self) -> int:
        """Hidden size F of the MLP."""
        if self.mlp_width is not None:
            return self.mlp_width
        return -(-8 * self.width // 3 // 256) * 256 if self.activation in GATED else 4 * self.width

    @property
    def padded_vocab_size(self) -> int:
        """Rows of embedding and head: vocab_size rounded up to a multiple of vocab_multiple."""
        if self.vocab_size is None:
            raise ValueError("ModelConfig: vocab_size is None, expected a number (dataclasses.replace sets it)")
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def width_ratio(self) -> float:
        """mup_base_width / width; 1 without µP."""
        return 1.0 if self.mup_base_width is None else self.mup_base_width / self.width

    @property
    def score_scale(self) -> float | None:
        """Factor of q k^T; None is 1 / sqrt(head_dim)."""
        if self.mup_base_head_dim in (None, self.d_head):
            return self.attn_scale
        return math.sqrt(self.mup_base_head_dim or 1) / self.d_head

    def window_of(self, layer: int) -> int | None:
        """Return the attention window of a layer; None means all keys."""
        return self.window[layer % len(self.window)] if isinstance(self.window, list) else self.window


def model_from_dict(settings: dict[str, Any]) -> ModelConfig:
    """Rebuild a ModelConfig from its dataclasses.asdict.

    Raises:
        UserError: unknown keys, wrong types or invalid values.
    """
    return ModelConfig(**options.from_mapping(ModelConfig, settings))
