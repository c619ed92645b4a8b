"""Tiny random models of every causal language model of transformers, each from its own config class.

A setting is chosen by its name: `SIZES` holds the value of each name that the config classes use, and `DIFFERENCES`
what a type needs in addition. A multimodal type is built as its text model where transformers maps the text config to
a causal language model.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

VOCAB, B, T, WINDOW = 197, 2, 12, 5
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER = 64, 4, 2, 16, 96
_VALUES: list[tuple[Any, str]] = [
    (VOCAB, "vocab_size audio_vocab_size"),
    (
        HIDDEN,
        "hidden_size d_model n_embd emb_dim embedding_size word_embed_proj_dim embedding_dim "
        "attention_hidden_size input_embedding_size output_embedding_size lru_width backbone_hidden_size "
        "hidden_size_global "
        "max_position_embeddings n_positions n_ctx max_target_positions max_source_positions max_seq_len "
        "context_length original_max_position_embeddings",
    ),
    (
        INNER,
        "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim dim_ff d_inner dff ffn_hidden_size "
        "dense_intermediate_size intermediate_size_mlp feed_forward_size prefix_dense_intermediate_size",
    ),
    (
        32,
        "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size index_head_dim d_rel "
        "moe_shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size "
        "index_topk rel_extent",
    ),
    (
        2,
        "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers "
        "num_encoder_layers num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok "
        "moe_topk moe_k top_k_experts linear_num_key_heads index_n_heads",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
        "num_encoder_attention_heads num_decoder_attention_heads attention_heads swa_num_attention_heads "
        "linear_num_value_heads linear_num_heads num_experts num_local_experts n_routed_experts "
        "moe_num_experts",
    ),
    (
        HEAD_DIM,
        "head_dim v_head_dim qk_head_dim kv_channels dim_head swa_head_dim linear_key_head_dim "
        "linear_value_head_dim linear_head_dim query_pre_attn_scalar kv_lora_rank d_head attention_head_size "
        "mamba_d_head mamba_head_dim",
    ),
    (
        8,
        "qk_rope_head_dim qk_nope_head_dim rotary_dim mamba_d_state state_size ssm_state_size "
        "mamba_chunk_size mamba_n_heads mamba_num_heads n_mamba_heads hidden_size_per_layer_input laurel_rank "
        "gated_norm_rank router_hidden_size block_size",
    ),
    (24, "q_lora_rank"),
    (WINDOW, "sliding_window sliding_window_size attention_window_size window_size local_attention"),
    (
        1,
        "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace "
        "num_dense_layers mamba_n_groups n_groups mamba_ngroups",
    ),
    (True, "is_decoder"),
    (False, "use_mamba_kernels"),
    (0, "num_mtp_layers num_nextn_predict_layers"),
]
SIZES: dict[str, Any] = {name: value for value, names in reversed(_VALUES) for name in names.split()}
FULL: dict[str, Any] = dict(attention_type="original_full")
WINDOWS_AND_ALL = ["sliding_attention", "full_attention"]
SHARED: dict[str, Any] = dict(  # the last two layers use the keys and values of the first two
    num_hidden_layers=4, layer_types=2 * WINDOWS_AND_ALL, num_kv_shared_layers=2
)
SHARED_3N: dict[str, Any] = dict(vocab_size_per_layer_input=VOCAB, **SHARED)
SECTIONS: dict[str, Any] = dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2])
INDEXED: dict[str, Any] = dict(
    ngram_vocab_size_base=50, hc_lowrank=8, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=HEAD_DIM,
    indexer_budget=4, indexer_compress_ratio=2, rope_parameters=SECTIONS,
)  # fmt: skip
_PER_LAYER = ("vocab_size_per_layer_input", "hidden_size_per_layer_input")
ASSISTANT: dict[str, Any] = dict(  # the default is refused
    hidden_size=HIDDEN,
    num_hidden_layers=2,
    vocab_size=VOCAB,
    vocab_size_per_layer_input=0,
    hidden_size_per_layer_input=0,
)
CODES: dict[str, Any] = dict(num_codebooks=2, pad_token_id=VOCAB, bos_token_id=VOCAB)
HYBRID: dict[str, Any] = dict(num_hidden_layers=4, layers_block_type=["mamba", "hybrid", "mamba", "hybrid"])
DIFFERENCES: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=[1]),
    "big_bird": FULL,
    "bigbird_pegasus": FULL,
    "blt": dict(
        num_hidden_layers=2,
        encoder_hash_byte_group_vocab=50,
        encoder_hash_byte_group_size=[2, 3],
        patching_threshold=4.6,
        local_attention_window_len=WINDOW,
        rope_parameters=None,
    ),
    "cohere_compass_text": dict(layer_types=WINDOWS_AND_ALL, rope_parameters=dict.fromkeys(WINDOWS_AND_ALL, SECTIONS)),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
        ffn_config=dict(ffn_hidden_size=INNER, moe_num_experts=4, moe_top_k=2, hidden_size=HIDDEN),
    ),
    "falcon_h1": dict(mamba_d_ssm=128, mlp_multipliers=[0.7, 1.3]),
    "gemma3n": SHARED_3N,
    "gemma3n_text": SHARED_3N,
    "gemma4": SHARED_3N,
    "gemma4_assistant": dict(text_config=ASSISTANT),
    "gemma4_text": SHARED_3N,
    "gemma4_unified": SHARED,
    "gemma4_unified_text": SHARED,
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "longcat_flash": dict(zero_expert_num=2, num_key_value_heads=HEADS, head_dim=8),
    "mamba2": dict(num_heads=8),
    "musicgen": CODES,
    "musicgen_melody": CODES,
    "recurrent_gemma": dict(num_hidden_layers=3),
    "reformer": dict(attn_layers=["local", "lsh"], axial_pos_shape=(3, 4), axial_pos_embds_dim=(32, 32)),
    "qwen4_exp": INDEXED,
    "qwen4_exp_text": INDEXED,
    "xlstm": dict(hidden_size=128, embedding_dim=128, autocast_kernel_dtype="float32"),  # 64: its cache has other sizes
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(attention_hidden_size=None, **HYBRID),
    "zamba2": HYBRID,
    "zaya": dict(num_experts_per_tok=1),
}
AFTER_IMAGES = ("git",)  # types whose loss leaves out the places of an image before the text
SEVERAL = ("layer_types", "mlp_layer_types", "layers_block_type")  # one layer of each kind


def types() -> list[str]:
    """Return the names of all model types that transformers maps to a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _fields(cls: Any) -> dict[str, Any]:
    """Return the settings of a config class, with their defaults."""
    names = [n for c in reversed(cls.__mro__) for n in vars(c).get("__annotations__", {})]
    return {n: getattr(cls, n, None) for n in names}


@functools.cache
def config_class(kind: str) -> Any:
    """Return the config class of a type; of a multimodal type that of its text model, if that is a causal LM."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    cls = CONFIG_MAPPING[kind]
    inner = getattr(cls, "sub_configs", {})
    if len(inner) < 2:
        return cls
    for name in ("text_config", "decoder"):
        if name in inner:
            text = type(getattr(cls(), name))
            own = MODEL_FOR_CAUSAL_LM_MAPPING[cls].config_class if cls in MODEL_FOR_CAUSAL_LM_MAPPING else None
            cls = text if text in MODEL_FOR_CAUSAL_LM_MAPPING or text is own else cls
    return cls


def model_class(kind: str) -> Any:
    """Return the class of a type's model, or of its text model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    cls = config_class(kind)
    return MODEL_FOR_CAUSAL_LM_MAPPING[cls if cls in MODEL_FOR_CAUSAL_LM_MAPPING else CONFIG_MAPPING[kind]]


def _settings(cls: Any, extra: dict[str, Any]) -> dict[str, Any]:
    """Return tiny settings of a config class, with those of the configs inside it."""
    fields = _fields(cls)
    made = {n: SIZES[n] for n in fields if n in SIZES}
    zeros = (n for n, v in fields.items() if ("drop" in n or "jitter" in n) and type(v) in (int, float))
    made |= {n: type(fields[n])(0) for n in zeros}
    made |= {n: None if fields[n] is None else 1 for n in ("bos_token_id", "eos_token_id") if n in fields}
    if "kv_lora_rank" in fields:  # every head has keys of its own
        made |= {n: HEADS for n in ("num_key_value_heads",) if n in fields}
    made |= {"pad_token_id": None if fields["pad_token_id"] is None else 0} if "pad_token_id" in fields else {}
    inner = (getattr(cls, "sub_configs", None) or {}).keys() - extra.keys()
    if inner:
        whole = cls()
        made |= {n: _settings(type(c), {}) for n in inner if (c := getattr(whole, n, None)) is not None}
    return made | extra


def config_of(kind: str, **extra: Any) -> Any:
    """Return a tiny config of this type, with a layer of each kind that its class makes."""
    cls = config_class(kind)
    settings = _settings(cls, DIFFERENCES.get(kind, {}) | extra)
    deep = "num_hidden_layers" in settings and not settings.keys() & set(SEVERAL)
    if deep and any(n in _fields(cls) for n in SEVERAL):
        whole = cls(**{**copy.deepcopy(settings), "num_hidden_layers": 12})
        kinds = {n: list(dict.fromkeys(v)) for n in SEVERAL if isinstance(v := getattr(whole, n, None), (list, tuple))}
        depth = max([2, *map(len, kinds.values())])
        settings |= {n: (v * depth)[:depth] for n, v in kinds.items() if n in _fields(cls)}
        settings["num_hidden_layers"] = depth
    return cls(**copy.deepcopy(settings))


def make(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **extra: Any) -> Any:
    """Return the model of this type, in evaluation mode, with weights that make every detail count: no norm's weight is
    1, no bias 0."""
    torch.manual_seed(seed)
    model = model_class(kind)._from_config(config_of(kind, **extra), dtype=torch.float32)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i + 1000 * seed))
    return model.to(dtype).eval()


def tokens(seed: int = 0, rows: int = B) -> Tensor:
    """Return tokens (rows, T) that no type reads as padding."""
    return torch.randint(5, VOCAB, (rows, T), generator=torch.Generator().manual_seed(seed))


def codebooks(model: Any) -> int:
    """Return how many tokens a model reads and predicts at a place: one for each of its heads; 0 if it has one head."""
    heads = model.get_output_embeddings()
    return len(heads) if isinstance(heads, nn.ModuleList) else 0


def batch(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Return what a model reads: tokens (B, T), or (B codebooks, T), and an image where its text follows one."""
    given = {"input_ids": tokens(seed, B * (codebooks(model) or 1))}
    if model.config.model_type in AFTER_IMAGES:
        size = model.config.vision_config.image_size
        given["pixel_values"] = torch.randn(B, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return given


def generation_settings(model: Any) -> dict[str, int]:
    """Return what `generate` needs for a model with codebooks: the token where one of them has none yet."""
    fill = dict.fromkeys(("pad_token_id", "decoder_start_token_id"), VOCAB)
    return {**fill, "num_return_sequences": 1} if codebooks(model) else {}


def labels(model: Any, seed: int = 0) -> Tensor:
    """Return the tokens that a model predicts: (B, T), or (B, T, codebooks)."""
    found = codebooks(model)
    return tokens(seed, B * found).view(B, found, T).transpose(1, 2) if found else tokens(seed)
