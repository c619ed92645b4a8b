"""Continue a batch of prompts of equal length: one call around `Generator`, for tensors of ids."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.inference.generator import Generator
from fastgpt.inference.requests import Request
from fastgpt.models.gpt import GPT


def generate(
    model: GPT,
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eot: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Append up to max_new_tokens sampled tokens to ids (B, T): (B, T + n), on the device of ids.

    Args:
        temperature, top_k, top_p: as in `Request`.
        eot: token that ends a row (kept, and repeated while other rows continue); None never ends a row.
        generator: draws the seed of each row; by default from torch's default generator.

    The model is in eval mode during the call. Raises ValueError, which names the argument.
    """
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise ValueError(f"generate: ids has shape {tuple(ids.shape)}, expected (B, T) with T >= 1")
    device = "cpu" if generator is None else generator.device
    seeds = torch.randint(2**63 - 1, (ids.shape[0],), generator=generator, device=device).tolist()
    options = dict(temperature=temperature, top_k=top_k, top_p=1.0 if top_p is None else top_p)
    requests = [
        Request(prompt, max_new_tokens, seed=seed, **options)  # type: ignore[arg-type]
        for prompt, seed in zip(ids.tolist(), seeds)
    ]
    results = Generator(model, max_batch=max(1, len(requests)), eos=eot).generate(requests)
    longest = max((len(r.ids) for r in results), default=0)
    fill = 0 if eot is None else eot
    new = [r.ids + [fill] * (longest - len(r.ids)) for r in results]
    added = torch.tensor(new, dtype=ids.dtype, device=ids.device).view(len(new), longest)
    return torch.cat((ids, added), dim=1)
