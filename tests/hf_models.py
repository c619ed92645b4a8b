"""Tiny random models of transformers, one for each case that fastgpt.models.weights has to get right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SIZES = dict(vocab_size=97, max_position_embeddings=32)
BLOCKS = dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=48)
GQA = SIZES | BLOCKS | dict(num_key_value_heads=2)
OLD_SIZES = dict(vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=4)
NEO = SIZES | dict(num_layers=4, num_heads=4, hidden_size=32)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 500.0, **parameters}}


# name -> (configuration class, its arguments)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", OLD_SIZES),
    "gpt2 untied, unscaled, erf": (
        "GPT2",
        OLD_SIZES | dict(tie_word_embeddings=False, scale_attn_weights=False, activation_function="gelu", n_inner=40),
    ),
    "gpt_neo": ("GPTNeo", NEO | dict(attention_types=[[["global", "local"], 2]], window_size=8)),
    "gptj": ("GPTJ", OLD_SIZES | dict(rotary_dim=4)),
    "gpt_neox": ("GPTNeoX", SIZES | BLOCKS),
    "gpt_neox serial, no bias, tied": (
        "GPTNeoX",
        SIZES | BLOCKS | dict(use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True),
    ),
    "llama": ("Llama", GQA | rope(rope_type="default")),
    "llama tied, biases, head_dim": (
        "Llama",
        GQA | dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=16),
    ),
    "llama linear": ("Llama", GQA | rope(rope_type="linear", factor=4.0)),
    "llama llama3": ("Llama", GQA | rope(**LLAMA3)),
    "llama yarn": ("Llama", GQA | rope(**YARN)),
    "llama yarn, all keys": (
        "Llama",
        GQA | rope(**YARN, beta_fast=16.0, beta_slow=2.0, mscale=1.0, mscale_all_dim=0.5, truncate=False),
    ),
    "mistral": ("Mistral", GQA | dict(sliding_window=8)),
    "mistral without window": ("Mistral", GQA | dict(sliding_window=None, head_dim=16)),
    "qwen2": ("Qwen2", GQA | dict(tie_word_embeddings=True)),
    "qwen2 windows": ("Qwen2", GQA | dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)),
    "qwen3": ("Qwen3", GQA | dict(head_dim=16)),
    "qwen3 windows, biases": (
        "Qwen3",
        GQA
        | dict(head_dim=16, attention_bias=True, use_sliding_window=True, sliding_window=8)
        | dict(layer_types=["sliding_attention", "full_attention"]),
    ),
    "gemma": ("Gemma", GQA | dict(head_dim=16)),
    "llama dynamic": ("Llama", GQA | dict(max_position_embeddings=16) | rope(rope_type="dynamic", factor=2.0)),
}


def make(name: str, seed: int = 0) -> Any:
    """Return the model of a case, in fp32 and evaluation mode, with weights that make every detail count."""
    import transformers

    kind, options = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**options, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    """Return the logits of a model of either side, (B, T, V) fp32."""
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, Tensor) else out.logits


def ids(length: int = 31) -> Tensor:
    """Return tokens (2, length) that all models have."""
    return torch.randint(97, (2, length), generator=torch.Generator().manual_seed(5))


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the scale of b."""
    return float((a - b).abs().max() / b.abs().max())
