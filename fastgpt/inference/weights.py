"""Weights of a model in fewer bits, for inference on a CPU, where a step's time is that of reading them.

    bf16    w = round to bf16                                     half the bytes of fp32
    int8    s = max |w| / 127 of a row,  w = s round(w / s)       a quarter; symmetric, one scale for each output

Activations, norms, biases and learned positions keep their dtype. A head that is tied to the token embedding stays one
tensor. Products are summed in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.core.device import return_freed_memory
from fastgpt.models.gpt import GPT
from fastgpt.nn import Linear
from fastgpt.nn.narrow import NarrowEmbedding, NarrowLinear

KINDS = ("fp32", "bf16", "int8")


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (F, C) int8 and scales (F,) fp32 for a weight (F, C)."""
    wide = weight.detach().float()
    scale = wide.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (wide / scale[:, None]).round_().to(torch.int8), scale


@torch.no_grad()
def convert_weights(model: GPT, kind: str) -> GPT:
    """Convert the weights of a model in place, one matrix after the other, and return the model.

    Args:
        model: on a CPU; its activations become fp32.
        kind: "fp32", "bf16" or "int8". A converted model has no gradients and cannot be converted again, except to its
            own kind.

    Raises:
        ValueError: names what was received and what is expected.
    """
    if kind not in KINDS:
        raise ValueError(f"weights is {kind!r}, expected one of {', '.join(KINDS)}")
    device = model.wte.weight.device
    if device.type != "cpu":
        raise ValueError(f"weights is {kind!r} and the model is on {device}, expected a model on a CPU")
    if isinstance(model.head, NarrowLinear):
        now = "int8" if model.head.weight.dtype == torch.int8 else "bf16"
        if now != kind:
            raise ValueError(f"weights is {kind!r} and the model's weights are {now}, expected a model in fp32")
        return model
    model.float()
    if kind == "fp32":
        return model

    def narrow(weight: Tensor) -> tuple[Tensor, Tensor | None]:
        return quantise(weight) if kind == "int8" else (weight.detach().bfloat16(), None)

    for parent in [m for m in model.modules() if m is not model]:
        for name, m in [(name, m) for name, m in parent.named_children() if type(m) is Linear]:
            setattr(parent, name, NarrowLinear(*narrow(m.weight), m.bias))
    vocab = model.vocab_size
    bias = None if model.head.bias is None else model.head.bias[:vocab]
    weight, scale = narrow(model.wte.weight)
    model.wte = NarrowEmbedding(weight, scale, torch.float32)
    if not model.config.tied:
        weight, scale = narrow(model.head.weight)
    model.head = NarrowLinear(weight[:vocab], None if scale is None else scale[:vocab], bias)
    return_freed_memory()  # else the fp32 matrices may stay with the process
    return model.requires_grad_(False)
