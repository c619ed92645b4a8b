"""One query for each row over a whole cache: q (B, 1, H, D), k and v (B, S, G, D), at (B, S, H, G, D).

Bytes, e per element: reads q, k, v; writes out: 2 B (H + S G) D e. The partial sums of the splits are not counted.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.bench import _command, _op
from fastgpt.bench._op import Bench, Job, Provider, Setting, Shape, installed
from fastgpt.core.command import run_command
from fastgpt.models.config import ModelConfig

PAGE = 16  # slots of a page


def masked(q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor) -> Tensor:
    """Call PyTorch's scaled_dot_product_attention with a mask from the lengths, as in transformers' static cache."""
    mask = torch.arange(k.shape[1], device=k.device) < kv_lens[:, None, None, None]
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)


def unmasked(q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor) -> Tensor:
    """Call it without a mask, which is right only where all rows fill the cache, as they do here."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped).transpose(1, 2)


def paged(q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor) -> Tensor:
    """Call fastgpt's op with the same memory as a pool of pages, whose order is the reverse."""
    size = min(PAGE, k.shape[1])
    k_pool, v_pool = (x.reshape(-1, size, *x.shape[2:]) for x in (k, v))
    return ops.attention_decode(q, k_pool, v_pool, kv_lens, pages=table(k.shape[0], k.shape[1] // size, str(k.device)))


@functools.cache
def table(batch: int, of_row: int, device: str) -> Tensor:
    return torch.arange(batch * of_row - 1, -1, -1, dtype=torch.int32, device=device).view(batch, of_row)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor) -> Tensor:
    """Call flash-attn's kernel for a cache, which splits the keys, too."""
    from flash_attn import flash_attn_with_kvcache

    return flash_attn_with_kvcache(q, k, v, cache_seqlens=kv_lens)


def flash_attn_3(q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor) -> Tensor:
    """Call that of flash-attn 3, for Hopper."""
    from flash_attn_interface import flash_attn_with_kvcache

    return flash_attn_with_kvcache(q, k, v, cache_seqlens=kv_lens)


def job(provider: Provider, setting: Setting, phase: str, seed: int) -> Job:
    """Return one call over its own q, k, v, with lengths that fill the cache."""
    b, s, h, g, d = setting.shape
    q, k, v = setting.tensors(seed, (b, 1, h, d), (b, s, g, d), (b, s, g, d))
    lens = torch.full((b,), s, dtype=torch.int32, device=setting.device)
    return Job(torch.no_grad()(lambda: provider.fn(q, k, v, lens)))


def bytes_moved(shape: Shape, dtype: torch.dtype, phase: str) -> int:
    """Return the bytes of a call, by the formula in the module docstring."""
    b, s, h, g, d = shape
    return 2 * b * (h + s * g) * d * dtype.itemsize


def of_model(c: ModelConfig, batch: int, block: int) -> tuple[Shape, dict[str, Any]] | None:
    """Return None: no training step calls it."""
    return None


def others(setting: Setting) -> list[Provider]:
    """Return SDPA without a mask, fastgpt's op over pages, and flash-attn."""
    found = [Provider("sdpa no mask", unmasked), Provider(f"pages of {PAGE}", paged)]
    return [*found, *installed(setting, flash_attn=flash_attn, flash_attn_interface=flash_attn_3)]


BENCH = Bench(
    "attention_decode",
    "BxSxHxGxD",
    ops.attention_decode,
    Provider("torch", masked),
    job,
    bytes_moved,
    of_model,
    shapes={
        "cpu": ((1, 256, 12, 12, 64), (1, 4096, 32, 8, 128)),
        "cuda": ((1, 32768, 32, 8, 128), (16, 1024, 12, 12, 64), (64, 4096, 32, 8, 128)),
    },
    tiny=(1, 8, 2, 1, 16),
    phases=("forward",),
    gate_cases=lambda shape: [((1, 1, min(shape[1], 600), *shape[2:]), {})],
    others=others,
)
pytest_generate_tests, test_attention_decode = _op.pytest_generate_tests, _op.run_benchmark

if __name__ == "__main__":
    sys.exit(run_command(lambda: _command.main(BENCH)))
