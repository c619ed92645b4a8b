"""Tiny random models of the encoders and encoder-decoders of transformers, each from its own config class, and batches
for them.

A type is built as the first that transformers has of: sequence to sequence, speech to text, masked tokens, classes of
images. Settings are chosen as in causal_models, with the values here in addition.
"""

from __future__ import annotations

from typing import Any

import causal_models
import torch
from causal_models import HIDDEN, VOCAB, B, T
from torch import Tensor

CLASSES, FRAMES, IMAGE, SAMPLES, BINS = 5, 40, 32, 2000, 8
TEXT = ("input_ids", "inputs")  # names of tokens
TASKS = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM", "IMAGE_CLASSIFICATION")
SIZES: dict[str, Any] = dict(
    is_decoder=False, decoder_start_token_id=2, forced_bos_token_id=None, forced_eos_token_id=None,
    suppress_tokens=None, begin_suppress_tokens=None, mask_time_prob=0.0, mask_feature_prob=0.0,
    apply_spec_augment=False, image_size=IMAGE, patch_size=8, num_mel_bins=BINS, input_feat_per_channel=BINS,
    d_ff=96, d_kv=16, d_kv_cross=16, projection_dim=HIDDEN, num_hidden_groups=1, num_hashes=1, attention_window=4,
    window_size=4,
    encoder_num_hidden_layers=2, decoder_num_hidden_layers=2, encoder_num_attention_heads=4,
    decoder_num_attention_heads=4, encoder_num_key_value_heads=4, decoder_num_key_value_heads=4, num_key_value_heads=4,
    max_2d_position_embeddings=64, encoder_max_relative_position=8, decoder_max_relative_position=8,
    bottleneck_size=32, intra_bottleneck_size=32, true_hidden_size=64, num_latents=8, d_latents=64,
    num_self_attention_heads=4, num_cross_attention_heads=4, num_self_attends_per_block=2,
)  # fmt: skip
DIFFERENCES: dict[str, dict[str, Any]] = {
    "convnext": dict(image_size=64),
    "convnextv2": dict(image_size=64),
    "cvt": dict(depth=(1, 2, 3)),
    "efficientnet": dict(depth_coefficient=0.1, width_coefficient=0.5, hidden_dim=640),
    "donut-swin": dict(depths=(1, 1), num_heads=(2, 4), patch_size=4),
    "esm": dict(mask_token_id=3, pad_token_id=0),
    "mobilevitv2": dict(image_size=128, patch_size=2),
    "moonshine": dict(pad_token_id=0),
    "perceiver": dict(max_position_embeddings=T),
    "reformer": dict(axial_pos_shape=(3, 4)),
    "swin": dict(depths=(1, 1), num_heads=(2, 4), patch_size=4),
    "swinv2": dict(depths=(1, 1), num_heads=(2, 4), patch_size=4),
    "levit": dict(image_size=64, patch_size=16),
    "funnel": dict(block_sizes=[1, 1], block_repeats=[1, 1]),
    "fsmt": dict(src_vocab_size=VOCAB, tgt_vocab_size=VOCAB),
    "luke": dict(entity_vocab_size=10, entity_emb_size=16),
    "switch_transformers": dict(num_sparse_encoder_layers=1, num_sparse_decoder_layers=1),
    "textnet": dict(image_size=(64, 64)),
}


def _mappings() -> list[Any]:
    from transformers.models.auto import modeling_auto

    return [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING") for task in TASKS]


def config_class(kind: str) -> Any:
    """Return the config class of a type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[kind]


def types() -> list[str]:
    """Return the types that transformers maps to one of TASKS; of sequences and speech those with an encoder, a
    decoder, and one config for both."""
    from transformers.models.auto import modeling_auto

    found = dict[str, None]()
    for task in TASKS:
        names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
        found |= {n: None for n in names if "SEQ" not in task or _has_both(n)}
    return sorted(found)


def _has_both(kind: str) -> bool:
    """Return whether a type is an encoder and a decoder that are made for each other."""
    return getattr(config_class(kind), "is_encoder_decoder", False) is True and "encoder-decoder" not in kind


def model_class(kind: str) -> Any:
    """Return the class of a type's model."""
    cls = config_class(kind)
    made = next(m[cls] for m in _mappings() if cls in m)
    return made[0] if isinstance(made, tuple) else made


def _settings(cls: Any, extra: dict[str, Any]) -> dict[str, Any]:
    """Return tiny settings of a config class, with those of the configs inside it."""
    fields = causal_models._fields(cls)
    made = causal_models._settings(cls, {})
    made |= {n: SIZES[n] for n in fields if n in SIZES}
    made = {n: v for n, v in made.items() if type(v) is not int or not isinstance(fields.get(n), (tuple, list))}
    made |= {n: type(v)(0.0 for _ in v) for n, v in fields.items() if "drop" in n and _numbers(v, float)}
    made |= {n: type(v)(1 for _ in v) for n, v in fields.items() if n in ("depths", "depth") and _numbers(v, int)}
    inner = getattr(cls, "sub_configs", None)
    if inner:
        whole = cls()
        made |= {n: _settings(type(c), {}) for n in inner if (c := getattr(whole, n, None)) is not None}
    return made | extra


def _numbers(value: Any, kind: type) -> bool:
    return isinstance(value, (tuple, list)) and bool(value) and all(type(v) is kind for v in value)


def make(kind: str, **extra: Any) -> Any:
    """Return the model of this type, in evaluation mode, with weights that make every detail count."""
    cls = config_class(kind)
    own = model_class(kind)
    labels = dict(num_labels=CLASSES) if "ImageClassification" in own.__name__ else {}
    config = cls(**_settings(cls, labels | causal_models.DIFFERENCES.get(kind, {}) | DIFFERENCES.get(kind, {}) | extra))
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = SIZES["decoder_start_token_id"]
    torch.manual_seed(0)
    model = own._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return model.eval()


def inputs_of(model: Any, name: str, seed: int = 0) -> dict[str, Any]:
    """Return keyword arguments of a model's forward without labels; name: a kind of input of `kinds`."""
    g = torch.Generator().manual_seed(seed)
    main, config = model.main_input_name, model.config
    if main == "pixel_values":
        size = getattr(config, "image_size", None) or getattr(
            getattr(config, "vision_config", None), "image_size", IMAGE
        )
        height, width = (size, size) if isinstance(size, int) else size
        return {main: torch.randn(B, getattr(config, "num_channels", 3), height, width, generator=g)}
    if main == "input_features":
        frames = (
            (B, BINS, 2 * config.max_source_positions) if model.config.model_type == "whisper" else (B, FRAMES, BINS)
        )
        return {main: torch.randn(frames, generator=g)}
    if main == "input_values":
        return {main: torch.randn(B, SAMPLES, generator=g)}
    given = {main: causal_models.tokens(seed)}
    if name != "plain":
        seen = torch.ones(B, T, dtype=torch.long)
        seen[0, slice(0, 4) if name == "left padding" else slice(T - 4, T)] = 0
        given["attention_mask"] = seen
    return given


def kinds(model: Any) -> tuple[str, ...]:
    """Return the kinds of input that a model can get."""
    return ("plain", "right padding", "left padding") if model.main_input_name in TEXT else ("plain",)


def labels_of(model: Any, seed: int = 0) -> Tensor:
    """Return labels: tokens (B, T), some of them ignored, or classes (B,)."""
    if "ImageClassification" in type(model).__name__:
        return torch.randint(CLASSES, (B,), generator=torch.Generator().manual_seed(seed))
    labels = causal_models.tokens(seed + 7)
    labels[1, -3:] = -100  # padding, which an encoder-decoder may not see
    return labels
