"""Modules over fastgpt.ops that take the place of torch.nn's: constructors, initial values and state_dict keys are the
same, extra settings are keywords; a call that an op does not cover goes to torch's own, logged once."""

from fastgpt.nn.attention import Attention, MultiheadAttention, RotaryEmbedding
from fastgpt.nn.embedding import Embedding
from fastgpt.nn.linear import KEPT_NUMEL, Linear, keep_gradients
from fastgpt.nn.losses import CrossEntropyLoss, LinearCrossEntropyLoss
from fastgpt.nn.mlp import GELU, MLP, BiasGELU, SwiGLU
from fastgpt.nn.norms import LayerNorm, RMSNorm

__all__ = [
    "GELU",
    "KEPT_NUMEL",
    "MLP",
    "Attention",
    "BiasGELU",
    "CrossEntropyLoss",
    "Embedding",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "SwiGLU",
    "keep_gradients",
]
