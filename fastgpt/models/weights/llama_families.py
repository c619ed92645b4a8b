"""Llama, Mistral, Qwen2 and Qwen3, whose layers are model.layers.{i}."""

from __future__ import annotations

import math
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.models.config import ModelConfig
from fastgpt.models.weights import rotary
from fastgpt.models.weights.family import GATES, Config, Family, Keys, activation, one_window, same_window, written
from fastgpt.models.weights.layouts import HalfRotary, HalfRotaryNorm, Layout, Split, Vocabulary

OF_LLAMA: Keys = {
    "n_layers": ("num_hidden_layers", 32),
    "n_heads": ("num_attention_heads", 32),
    "n_kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "width": ("hidden_size", 4096),
    "mlp_width": ("intermediate_size", 11008),
    "vocab_size": ("vocab_size", 32000),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "attn_dropout": ("attention_dropout", 0.0),
    "init_std": ("initializer_range", 0.02),
    "tied": ("tie_word_embeddings", False),
}
OF_MISTRAL: Keys = OF_LLAMA | {"n_kv_heads": ("num_key_value_heads", 8), "mlp_width": ("intermediate_size", 14336)}
OF_QWEN: Keys = OF_LLAMA | {
    "n_kv_heads": ("num_key_value_heads", 32),
    "mlp_width": ("intermediate_size", 22016),
    "vocab_size": ("vocab_size", 151936),
}
LLAMA_LAYOUTS: dict[str, Layout] = {
    "wte": Vocabulary(("model.embed_tokens",)),
    "norm_f": Layout(("model.norm",)),
    "head": Vocabulary(("lm_head",)),
    "blocks.{i}.norm1": Layout(("model.layers.{i}.input_layernorm",)),
    "blocks.{i}.norm2": Layout(("model.layers.{i}.post_attention_layernorm",)),
    "blocks.{i}.attn.qkv": HalfRotary(tuple(f"model.layers.{{i}}.self_attn.{x}_proj" for x in "qkv")),
    "blocks.{i}.attn.proj": Layout(("model.layers.{i}.self_attn.o_proj",)),
    "blocks.{i}.attn.q_norm": HalfRotaryNorm(("model.layers.{i}.self_attn.q_norm",)),
    "blocks.{i}.attn.k_norm": HalfRotaryNorm(("model.layers.{i}.self_attn.k_norm",)),
    "blocks.{i}.mlp.up": Split(("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj")),
    "blocks.{i}.mlp.down": Layout(("model.layers.{i}.mlp.down_proj",)),
}
NO_BIAS = {"qkv_bias": False, "proj_bias": False, "mlp_bias": False}
OF_RMS = {"norm": "rms", "positions": "rope"}


def _read_llama(config: Config, where: str, most: int = 2048) -> dict[str, Any]:
    rope = rotary.read_rope(config, where)
    if rope.pop("partial_rotary_factor") not in (None, 1, 1.0):
        raise UserError(f"{where} has partial_rotary_factor, which transformers ignores here: expected none")
    block = rotary.positions(config.get("max_position_embeddings", most), rope["rope_scaling"])
    return {**rope, **activation(config, "hidden_act", "silu", GATES, where), "block_size": block}


def _write_llama(c: ModelConfig) -> Config:
    return {
        **rotary.write_rope(c),
        "hidden_act": written(c, GATES),
        "max_position_embeddings": rotary.context(c),
    }


def _layer_windows(config: Config) -> int | list[int | None] | None:
    """Return the windows of Qwen's layers: the listed ones slide, else those from max_window_layers on."""
    size, n = config.get("sliding_window", 4096), config.get("num_hidden_layers", 32)
    if not config.get("use_sliding_window", False) or size is None:
        return None
    types = config.get("layer_types")
    types = types or ["sliding_attention"] * n
    first = config.get("max_window_layers", 28) if config.get("layer_types") is None else 0
    return one_window([size if i >= first and types[i] == "sliding_attention" else None for i in range(n)])


def _write_windows(c: ModelConfig) -> Config:
    slides = [c.window_of(i) is not None for i in range(c.n_layers)]
    first = slides.index(True) if any(slides) else c.n_layers
    return {
        "use_sliding_window": any(slides),
        "sliding_window": same_window(c),
        "max_window_layers": first,
        "layer_types": ["sliding_attention" if s else "full_attention" for s in slides],
    }


def _biases(config: Config, *names: str) -> dict[str, bool]:
    """Return the biases of attention, and of the MLP if it is among `names`."""
    attention = bool(config.get("attention_bias", False))
    found = {"qkv_bias": attention, "proj_bias": attention}
    return found | {"mlp_bias": bool(config.get("mlp_bias", False))} if "mlp" in names else found


def _read_llama_itself(config: Config, where: str) -> dict[str, Any]:
    width, heads = config.get("hidden_size", 4096), config.get("num_attention_heads", 32)
    if width % heads:
        raise UserError(f"{where} has hidden_size {width}, expected a multiple of num_attention_heads {heads}")
    return _read_llama(config, where) | _biases(config, "mlp")


LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    "model.",
    LLAMA_LAYOUTS,
    OF_LLAMA,
    OF_RMS,
    _read_llama_itself,
    lambda c: _write_llama(c) | {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias},
)
GEMMA_ACT = {"gelu": "gelu_pytorch_tanh", None: "gelu_pytorch_tanh"}  # what the first releases mean


def _read_gemma(config: Config, where: str) -> dict[str, Any]:
    if config.get("use_bidirectional_attention"):
        raise UserError(f"{where} has use_bidirectional_attention, which fastgpt's model does not have")
    act = config.get("hidden_act")
    known = config | {"hidden_act": GEMMA_ACT.get(act, act)}
    scale = math.sqrt(config.get("hidden_size", 3072))
    return _read_llama(known, where, 8192) | _biases(config) | {"embed_scale": scale}


GEMMA = Family(
    "gemma",
    "GemmaForCausalLM",
    "model.",
    LLAMA_LAYOUTS,
    OF_LLAMA
    | {
        "n_layers": ("num_hidden_layers", 28),
        "n_heads": ("num_attention_heads", 16),
        "n_kv_heads": ("num_key_value_heads", 16),
        "head_dim": ("head_dim", 256),
        "width": ("hidden_size", 3072),
        "mlp_width": ("intermediate_size", 24576),
        "vocab_size": ("vocab_size", 256000),
        "tied": ("tie_word_embeddings", True),
    },
    OF_RMS | NO_BIAS | {"norm_offset": 1.0},
    _read_gemma,
    lambda c: _write_llama(c) | {"attention_bias": c.qkv_bias, "hidden_activation": written(c, GATES)},
)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    "model.",
    LLAMA_LAYOUTS,
    OF_MISTRAL,
    OF_RMS | NO_BIAS,
    lambda config, where: _read_llama(config, where, 131072) | {"window": config.get("sliding_window", 4096)},
    lambda c: _write_llama(c) | {"sliding_window": c.window if not isinstance(c.window, list) else -1},
)
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    "model.",
    LLAMA_LAYOUTS,
    {ours: key for ours, key in OF_QWEN.items() if ours != "head_dim"},
    OF_RMS | NO_BIAS | {"qkv_bias": True},
    lambda config, where: _read_llama(config, where, 32768) | {"window": _layer_windows(config)},
    lambda c: _write_llama(c) | _write_windows(c),
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    "model.",
    LLAMA_LAYOUTS,
    OF_QWEN | {"head_dim": ("head_dim", 128)},
    OF_RMS | NO_BIAS | {"qk_norm": True},
    lambda config, where: _read_llama(config, where, 32768) | _biases(config) | {"window": _layer_windows(config)},
    lambda c: _write_llama(c) | _write_windows(c) | {"attention_bias": c.qkv_bias},
)
