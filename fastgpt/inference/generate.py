"""Sample from a model with a key-value cache: temperature, top-k, top-p (Holtzman 2019, arXiv:1904.09751).

If a text is longer than block_size, its first tokens are dropped, half a block at a time. So the cache is refilled only
every block_size / 2 tokens, and the model sees the same tokens with and without the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.models.gpt import GPT, KVCache


def context_start(length: int, block_size: int) -> int:
    """Return the first token that the model reads of a text of `length` tokens."""
    half = max(1, block_size // 2)
    return 0 if length <= block_size else -(-(length - block_size) // half) * half


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample one token per row: logits (B, V) -> (B,) int64. temperature 0 selects the most likely token."""
    if temperature == 0:
        return logits.argmax(-1)
    z = logits.float() / max(temperature, 1e-30)  # a smaller one overflows
    if top_k is not None and top_k < z.shape[-1]:
        z = z.masked_fill(z < z.topk(top_k).values[:, -1:], -torch.inf)
    p = z.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, index = p.sort(stable=True, dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # a token stays if the ones before it sum to less than top_p
        p = torch.zeros_like(p).scatter(-1, index, ordered.masked_fill(before >= top_p, 0.0))
    return torch.multinomial(p, 1, generator=generator)[:, 0]


def _check(model: GPT, ids: Tensor, count: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise ValueError(f"generate: ids has shape {tuple(ids.shape)}, expected (B, T) with T >= 1")
    if count < 0:
        raise ValueError(f"generate: max_new_tokens is {count}, expected 0 or more")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"generate: temperature is {temperature}, expected 0 or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k is {top_k}, expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p is {top_p}, expected more than 0, at most 1")


@torch.no_grad()
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
    use_cache: bool = True,
) -> Tensor:
    """Append up to max_new_tokens sampled tokens to ids (B, T): (B, T + n).

    Args:
        temperature: 0 selects the most likely token. top_k: sample only from the k most likely tokens. top_p: sample
            only from the most likely tokens whose probabilities sum to p.
        eot: token that ends a row (kept, and repeated while other rows continue); None never ends a row.
        generator: for reproducible samples, on the model's device.
        use_cache: False reads the whole context for every token: slower, with the same result.

    The model is in eval mode during the call. Raises ValueError, which names the argument.
    """
    _check(model, ids, max_new_tokens, temperature, top_k, top_p)
    was_training = model.training
    model.eval()
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    size = min(model.block_size, ids.shape[1] + max_new_tokens)
    cache, first = None, -1
    try:
        for _ in range(max_new_tokens):
            start = context_start(ids.shape[1], model.block_size)
            if not use_cache or start != first:  # the first pass, or the context has moved
                cache = KVCache(model.config, ids.shape[0], size, model.wte.weight) if use_cache else None
                first = start
            seen = 0 if cache is None else cache.length
            h = model.hidden(ids[:, start + seen :], kv_cache=cache)
            token = sample(model.logits(h[:, -1]), **options)  # type: ignore[arg-type]
            if eot is not None:
                token = torch.where(done, eot, token)
                done = token == eot
            ids = torch.cat((ids, token[:, None]), dim=1)
            if eot is not None and bool(done.all()):
                break
    finally:
        model.train(was_training)
    return ids
