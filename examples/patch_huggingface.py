"""Patch a Hugging Face model and train it.

Shows: what `fastgpt.patch` replaces, how a patched model is used like the original, and that `fastgpt.unpatch` restores
it bit for bit. Replace `from_config` by `from_pretrained("gpt2")` and `batches` by your data.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

import fastgpt
from fastgpt.optim import AdamW

VOCAB, BATCH, TOKENS = 256, 8, 32


def batches(steps: int) -> Iterator[Tensor]:
    """Return sequences that count upwards from a random number: a pattern that a small model learns in a few steps."""
    for _ in range(steps):
        start = torch.randint(VOCAB, (BATCH, 1))
        yield (start + torch.arange(TOKENS)) % VOCAB


def main(steps: int = 30) -> list[float]:
    """Train for some steps; return the losses."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=4, n_embd=64, vocab_size=VOCAB, n_positions=TOKENS, attn_pdrop=0.0)
    model = AutoModelForCausalLM.from_config(config)

    fastgpt.patch(model)  # in place; fastgpt.patch(model, dry_run=True) would only write the report
    print(fastgpt.patch_report(model))

    optimizer = AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, max_norm=1.0)  # clips the gradient norm to 1
    losses = []
    for ids in batches(steps):
        loss = model(input_ids=ids, labels=ids).loss  # labels are shifted by the model, as in transformers
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    fastgpt.unpatch(model)  # the same weights on the original code, ready for save_pretrained
    return losses


if __name__ == "__main__":
    main()
