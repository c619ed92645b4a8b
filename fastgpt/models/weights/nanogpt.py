"""A checkpoint of nanoGPT: ckpt.pt with the tensors and model_args that its train.py and sample.py read.

Source: github.com/karpathy/nanoGPT, model.py. Its GELU is exact, so a model with tanh's is slightly different there, as
OpenAI's GPT-2 is that nanoGPT loads itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.core.errors import UserError
from fastgpt.models.config import ModelConfig
from fastgpt.models.weights.convert import file_tensors
from fastgpt.models.weights.gpt_families import GPT2
from fastgpt.models.weights.mup import folded

LINEAR = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def require_gpt2(c: ModelConfig, what: str) -> None:
    """Refuse a model that is not a GPT-2 with 4C in its MLP, a tied head and biases in its norms.

    Raises:
        UserError: names what differs.
    """
    differs = GPT2.differences(c)
    differs += [] if c.d_mlp == 4 * c.width else [f"model.mlp_width {c.d_mlp}"]
    differs += [] if c.tied else ["model.tied False"]
    differs += [] if c.norm_bias else ["model.norm_bias False"]
    if differs:
        raise UserError(f"export: {what} has only GPT-2's shape, but the run has {', '.join(differs)}")


def write(folder: Path, c: ModelConfig, read: Callable[[str], Tensor], dtype: torch.dtype, step: int = 0) -> None:
    """Write ckpt.pt; it holds the whole model in memory, as torch.save does.

    Raises:
        UserError: the model is no GPT-2.
    """
    c, read = folded(c, read)
    require_gpt2(c, "nanoGPT")
    tensors: dict[str, Tensor] = {}
    for name, t in file_tensors(GPT2, c, read, dtype):
        tensors[name] = t.t().contiguous() if name.endswith(LINEAR) else t
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    arguments: dict[str, Any] = dict(n_layer=c.n_layers, n_head=c.n_heads, n_embd=c.width, block_size=c.block_size)
    arguments |= dict(vocab_size=c.vocab_size, bias=True, dropout=c.resid_dropout)
    content = {"model": tensors, "model_args": arguments, "iter_num": step, "best_val_loss": 1e9, "config": {}}
    torch.save(content, folder / "ckpt.pt")
