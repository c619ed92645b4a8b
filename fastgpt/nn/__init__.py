"""Modules over fastgpt.ops that replace their namesakes in torch.nn.

Constructors, initial values and state_dict keys match PyTorch; extra settings are keyword arguments. A call that an op
does not cover falls back to PyTorch's module, which is logged once.
"""

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
