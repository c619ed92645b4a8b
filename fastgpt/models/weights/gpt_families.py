"""GPT-2, GPT-Neo and GPT-J, whose layers are transformer.h.{i}, and GPT-NeoX."""

from __future__ import annotations

import math
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.models.config import ModelConfig
from fastgpt.models.weights import rotary
from fastgpt.models.weights.family import PLAIN, Config, Family, Keys, activation, one_window, same_window, written
from fastgpt.models.weights.layouts import ByHead, Layout, Split, Transposed, Vocabulary

OF_GPT2: Keys = {
    "n_layers": ("n_layer", 12),
    "n_heads": ("n_head", 12),
    "width": ("n_embd", 768),
    "mlp_width": ("n_inner", None),
    "vocab_size": ("vocab_size", 50257),
    "block_size": ("n_positions", 1024),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "embed_dropout": ("embd_pdrop", 0.1),
    "attn_dropout": ("attn_pdrop", 0.1),
    "resid_dropout": ("resid_pdrop", 0.1),
    "init_std": ("initializer_range", 0.02),
    "tied": ("tie_word_embeddings", True),
}
OF_GPTJ: Keys = OF_GPT2 | {
    "n_layers": ("n_layer", 28),
    "n_heads": ("n_head", 16),
    "width": ("n_embd", 4096),
    "vocab_size": ("vocab_size", 50400),
    "block_size": ("n_positions", 2048),
    "embed_dropout": ("embd_pdrop", 0.0),
    "attn_dropout": ("attn_pdrop", 0.0),
    "resid_dropout": ("resid_pdrop", 0.0),
    "rotary_dim": ("rotary_dim", 64),
    "tied": ("tie_word_embeddings", False),
}
OF_NEO: Keys = {
    "n_layers": ("num_layers", 24),
    "n_heads": ("num_heads", 16),
    "width": ("hidden_size", 2048),
    "mlp_width": ("intermediate_size", None),
    "vocab_size": ("vocab_size", 50257),
    "block_size": ("max_position_embeddings", 2048),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "embed_dropout": ("embed_dropout", 0.0),
    "attn_dropout": ("attention_dropout", 0.0),
    "resid_dropout": ("resid_dropout", 0.0),
    "init_std": ("initializer_range", 0.02),
    "tied": ("tie_word_embeddings", True),
}


def _transformer(**layouts: Layout) -> dict[str, Layout]:
    """Return the layouts of GPT-2's kin: `layouts` are those in a layer, with __ for a dot."""
    common: dict[str, Layout] = {
        "wte": Vocabulary(("transformer.wte",)),
        "wpe": Layout(("transformer.wpe",)),
        "norm_f": Layout(("transformer.ln_f",)),
        "head": Vocabulary(("lm_head",)),
        "blocks.{i}.norm1": Layout(("transformer.h.{i}.ln_1",)),
        "blocks.{i}.norm2": Layout(("transformer.h.{i}.ln_2",)),
    }
    inner = {
        f"blocks.{{i}}.{name.replace('__', '.')}": type(layout)(
            tuple(f"transformer.h.{{i}}.{m}" for m in layout.modules)
        )
        for name, layout in layouts.items()
    }
    return common | inner


def _read_gpt2(config: Config, where: str) -> dict[str, Any]:
    scale = None if config.get("scale_attn_weights", True) else 1.0
    return activation(config, "activation_function", "gelu_new", PLAIN, where) | {"attn_scale": scale}


def _write_gpt2(c: ModelConfig) -> Config:
    scaled = c.attn_scale is None or math.isclose(c.attn_scale, 1 / math.sqrt(c.d_head))
    return {
        "activation_function": written(c, PLAIN),
        "scale_attn_weights": scaled,
        "n_ctx": c.block_size,  # older readers of GPT-2, llama.cpp's among them, take the context from here
    }


GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    "transformer.",
    _transformer(
        attn__qkv=Transposed(("attn.c_attn",)),
        attn__proj=Transposed(("attn.c_proj",)),
        mlp__up=Transposed(("mlp.c_fc",)),
        mlp__down=Transposed(("mlp.c_proj",)),
    ),
    OF_GPT2,
    {},
    _read_gpt2,
    _write_gpt2,
)


def _read_neo(config: Config, where: str) -> dict[str, Any]:
    size, types = config.get("window_size", 256), config.get("attention_types") or [[["global", "local"], 12]]
    kinds = [kind for pattern, times in types for _ in range(times) for kind in pattern]
    if set(kinds) - {"global", "local"} or len(kinds) != config.get("num_layers", 24):
        raise UserError(f"{where} has attention_types {types!r}, expected global or local for each layer")
    windows = one_window([size if kind == "local" else None for kind in kinds])
    return activation(config, "activation_function", "gelu_new", PLAIN, where) | {"window": windows}


def _write_neo(c: ModelConfig) -> Config:
    kinds = ["global" if c.window_of(i) is None else "local" for i in range(c.n_layers)]
    return {
        "activation_function": written(c, PLAIN),
        "attention_types": [[kinds, 1]],
        "attention_layers": kinds,
        "window_size": same_window(c) or 256,
    }


GPT_NEO = Family(
    "gpt_neo",
    "GPTNeoForCausalLM",
    "transformer.",
    _transformer(
        attn__qkv=Split(("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj")),
        attn__proj=Layout(("attn.attention.out_proj",)),
        mlp__up=Layout(("mlp.c_fc",)),
        mlp__down=Layout(("mlp.c_proj",)),
    ),
    OF_NEO,
    {"attn_scale": 1.0, "qkv_bias": False},
    _read_neo,
    _write_neo,
)
GPTJ = Family(
    "gptj",
    "GPTJForCausalLM",
    "transformer.",
    _transformer(
        attn__qkv=Split(("attn.q_proj", "attn.k_proj", "attn.v_proj")),
        attn__proj=Layout(("attn.out_proj",)),
        mlp__up=Layout(("mlp.fc_in",)),
        mlp__down=Layout(("mlp.fc_out",)),
    ),
    OF_GPTJ,
    {
        "positions": "rope",
        "rope_interleaved": True,
        "parallel": "shared",
        "qkv_bias": False,
        "proj_bias": False,
        "head_bias": True,
    },
    lambda config, where: activation(config, "activation_function", "gelu_new", PLAIN, where),
    lambda c: {"activation_function": written(c, PLAIN)},
)


OF_NEOX: Keys = {
    "n_layers": ("num_hidden_layers", 44),
    "n_heads": ("num_attention_heads", 64),
    "width": ("hidden_size", 6144),
    "mlp_width": ("intermediate_size", 24576),
    "vocab_size": ("vocab_size", 50432),
    "norm_eps": ("layer_norm_eps", 1e-5),
    "embed_dropout": ("hidden_dropout", 0.0),
    "attn_dropout": ("attention_dropout", 0.0),
    "init_std": ("initializer_range", 0.02),
    "tied": ("tie_word_embeddings", False),
}


def _read_neox(config: Config, where: str) -> dict[str, Any]:
    rope = rotary.read_rope(config, where, theta_key="rotary_emb_base")
    fraction = rope.pop("partial_rotary_factor")
    fraction = config.get("rotary_pct", 0.25) if fraction is None else fraction
    head = config.get("hidden_size", 6144) // config.get("num_attention_heads", 64)
    biased = config.get("attention_bias", True)
    return {
        **rope,
        **activation(config, "hidden_act", "gelu", PLAIN, where),
        "rotary_dim": int(head * fraction),
        "block_size": rotary.positions(config.get("max_position_embeddings", 2048), rope["rope_scaling"]),
        "parallel": "separate" if config.get("use_parallel_residual", True) else "none",
        "qkv_bias": biased,
        "proj_bias": biased,
        "resid_dropout": config.get("hidden_dropout", 0.0),
    }


def _write_neox(c: ModelConfig) -> Config:
    fraction = c.rotary / c.d_head
    return {
        **rotary.write_rope(c, fraction),
        "rotary_pct": fraction,
        "rotary_emb_base": c.rope_theta,
        "hidden_act": written(c, PLAIN),
        "max_position_embeddings": rotary.context(c),
        "use_parallel_residual": c.parallel != "none",
        "attention_bias": c.qkv_bias,
    }


GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    "gpt_neox.",
    {
        "wte": Vocabulary(("gpt_neox.embed_in",)),
        "norm_f": Layout(("gpt_neox.final_layer_norm",)),
        "head": Vocabulary(("embed_out",)),
        "blocks.{i}.norm1": Layout(("gpt_neox.layers.{i}.input_layernorm",)),
        "blocks.{i}.norm2": Layout(("gpt_neox.layers.{i}.post_attention_layernorm",)),
        "blocks.{i}.attn.qkv": ByHead(("gpt_neox.layers.{i}.attention.query_key_value",)),
        "blocks.{i}.attn.proj": Layout(("gpt_neox.layers.{i}.attention.dense",)),
        "blocks.{i}.mlp.up": Layout(("gpt_neox.layers.{i}.mlp.dense_h_to_4h",)),
        "blocks.{i}.mlp.down": Layout(("gpt_neox.layers.{i}.mlp.dense_4h_to_h",)),
    },
    OF_NEOX,
    {"positions": "rope"},
    _read_neox,
    _write_neox,
    rename=(("lm_head.", "embed_out."),),  # the name in memory
)
