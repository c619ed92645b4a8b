"""A model of llm.c: gpt2.bin, a header of 256 int32 and then the parameters, each kind for all layers.

Source: github.com/karpathy/llm.c, train_gpt2.py (write_model). Version 3 is fp32, version 5 bf16; both have the rows of
the vocabulary padded to a multiple of 128.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgpt.core.errors import UserError
from fastgpt.models.config import ModelConfig
from fastgpt.models.weights.convert import exported
from fastgpt.models.weights.mup import folded
from fastgpt.models.weights.nanogpt import require_gpt2

MAGIC, VERSIONS = 20240326, {torch.float32: 3, torch.bfloat16: 5}
LAYERS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.up", "mlp.down")


def write(folder: Path, c: ModelConfig, read: Callable[[str], Tensor], dtype: torch.dtype) -> None:
    """Write gpt2.bin, one parameter at a time.

    Raises:
        UserError: the model is no GPT-2, its GELU is not tanh's, or llm.c has no such dtype.
    """
    c, read = folded(c, read)
    require_gpt2(c, "llm.c")
    if c.activation != "gelu_tanh" or dtype not in VERSIONS:
        raise UserError(f"export: llm.c has gelu_tanh in fp32 or bf16, but got {c.activation} in {dtype}")
    rows = -(-(c.vocab_size or 0) // 128) * 128
    header = np.zeros(256, "<i4")
    sizes = (c.block_size, c.vocab_size, c.n_layers, c.n_heads, c.width, rows)
    header[:8] = [MAGIC, VERSIONS[dtype], *sizes]
    with (folder / "gpt2.bin").open("wb") as f:
        f.write(header.tobytes())
        for name in _names(c):
            t = exported(name, read, dtype, _names(c))
            if name == "wte.weight":
                t = torch.cat((t[: c.vocab_size], t.new_zeros(rows - (c.vocab_size or 0), c.width)))
            f.write(t.contiguous().view(-1).view(torch.uint8).numpy().data)


def _names(c: ModelConfig) -> Iterator[str]:
    """Yield the parameters in the order of the file."""
    yield from ("wte.weight", "wpe.weight")
    for part in LAYERS:
        for leaf in ("weight", "bias"):
            yield from (f"blocks.{i}.{part}.{leaf}" for i in range(c.n_layers))
    yield from ("norm_f.weight", "norm_f.bias")
