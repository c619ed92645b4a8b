"""A fingerprint of a model's weights, by which an adapter knows its base."""

from __future__ import annotations

import hashlib

import torch

from fastgpt.models.gpt import GPT

EXACT = (torch.float32, torch.bfloat16, torch.float64)  # fp16 may have been rounded from fp32, and bf16 differs then
PADDED = ("wte.weight", "head.weight", "head.bias")


@torch.no_grad()
def fingerprint(model: GPT) -> str | None:
    """Return the sha256 of the parameters' names and values, rounded to bf16 and without the rows that pad the
    vocabulary. So a model has the same fingerprint in fp32, in bf16, as a run and exported.

    Returns:
        64 hexadecimal digits; None for a model in fp16, or with adapters, a task head or weights of fewer bits.
    """
    with torch.device("meta"):
        expected = [name for name, _ in GPT(model.config).named_parameters()]
    found = dict(model.named_parameters())
    if list(found) != expected or any(p.dtype not in EXACT for p in found.values()):
        return None
    digest = hashlib.sha256()
    for name, p in found.items():
        t = (p[: model.vocab_size] if name in PADDED else p).to(torch.bfloat16).cpu().contiguous()
        digest.update(f"{name} {tuple(t.shape)}\n".encode())
        digest.update(t.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
