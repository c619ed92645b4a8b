"""Drop-in ops: each is a function over PyTorch tensors, differentiable, compile-safe, on several backends."""

from fastgpt.core.backend import apply_environment, use
from fastgpt.ops import adamw as _adamw  # noqa: F401 (registers the optimizer's raw ops)
from fastgpt.ops.attention import attention, attention_qkv
from fastgpt.ops.attention_decode import attention_decode
from fastgpt.ops.bias_gelu import bias_gelu
from fastgpt.ops.cross_entropy import cross_entropy
from fastgpt.ops.embedding import embedding
from fastgpt.ops.gelu_mlp import gelu_mlp
from fastgpt.ops.layer_norm import layer_norm
from fastgpt.ops.linear import linear
from fastgpt.ops.linear_cross_entropy import linear_cross_entropy
from fastgpt.ops.linear_divergence import linear_divergence
from fastgpt.ops.linear_log_probs import linear_log_probs
from fastgpt.ops.linear_qkv import linear_qkv
from fastgpt.ops.rms_norm import rms_norm
from fastgpt.ops.rope import rope, rope_qkv
from fastgpt.ops.swiglu import swiglu

__all__ = [
    "attention",
    "attention_decode",
    "attention_qkv",
    "bias_gelu",
    "cross_entropy",
    "embedding",
    "gelu_mlp",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_log_probs",
    "linear_qkv",
    "rms_norm",
    "rope",
    "rope_qkv",
    "swiglu",
    "use",
]

apply_environment()
