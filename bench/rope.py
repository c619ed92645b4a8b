"""Rotary embedding of the query and key heads of one packed qkv (B, T, H + 2G, D), at (B, T, H, G, D).

Bytes, e per element, n = B T (H + G) D rotated elements (the value heads are not touched):
    forward   reads and writes q, k; reads cos, sin    2 n e + 4 T D
    backward  the same for dq, dk                      2 n e + 4 T D
PyTorch's version rotates q and k out of place and leaves v alone, as a model in plain PyTorch does; in backward it then
packs the three gradients.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.bench import _command, _op
from fastgpt.bench._op import Bench, Job, Provider, Setting, Shape, autograd_job, installed, of_phase
from fastgpt.core.command import run_command
from fastgpt.models.config import ModelConfig


class Projected(torch.autograd.Function):
    """A tensor over a leaf's memory, neither leaf nor view: like a projection's output it may be overwritten in
    place."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.new_empty(0).set_(leaf.untyped_storage(), 0, leaf.shape, leaf.stride())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x cos + rotate_half(x) sin, as in Hugging Face's models."""
    a, b = x.chunk(2, dim=-1)
    c, s = cos.repeat(1, 2)[:, None].to(x.dtype), sin.repeat(1, 2)[:, None].to(x.dtype)
    return x * c + torch.cat((-b, a), -1) * s


def plain(qkv: Tensor, cos: Tensor, sin: Tensor, *, n_heads: int, n_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute it in eager PyTorch."""
    q, k, v = qkv.split([n_heads, n_kv_heads, n_kv_heads], dim=2)
    return turn(q, cos, sin), turn(k, cos, sin), v


def liger(qkv: Tensor, cos: Tensor, sin: Tensor, *, n_heads: int, n_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Call Liger-Kernel; it copies views of a packed tensor."""
    from liger_kernel.transformers.functional import liger_rope

    q, k, v = qkv.split([n_heads, n_kv_heads, n_kv_heads], dim=2)
    wide = [t.repeat(1, 2)[None] for t in (cos, sin)]
    q, k = (t.transpose(1, 2) for t in liger_rope(q.transpose(1, 2), k.transpose(1, 2), *wide)[:2])
    return q, k, v


def flash_attn(qkv: Tensor, cos: Tensor, sin: Tensor, *, n_heads: int, n_kv_heads: int) -> Tensor:
    """Call flash-attn, in place on the packed tensor."""
    from flash_attn.layers.rotary import apply_rotary_emb_qkv_

    return apply_rotary_emb_qkv_(qkv, cos.to(qkv.dtype), sin.to(qkv.dtype), num_heads_q=n_heads)


def job(provider: Provider, setting: Setting, phase: str, seed: int) -> Job:
    """Return one call over its own packed tensor; an op in place rotates it further with every call."""
    b, t, h, g, d = setting.shape
    leaves = setting.tensors(seed, (b, t, h + 2 * g, d), grad=True)
    upstream = setting.tensors(seed, (b, t, h + 2 * g, d))
    if provider.fn in (plain, liger) or provider.name.startswith(("torch.compile", "compile")):
        upstream = [part.contiguous() for part in upstream[0].split([h, g, g], dim=2)]
    rate = 10000.0 ** (-torch.arange(0, d, 2, device=setting.device) / d)
    angle = torch.arange(t, device=setting.device)[:, None] * rate
    tables, heads = (angle.cos(), angle.sin()), dict(n_heads=h, n_kv_heads=g)
    return autograd_job(lambda: provider.fn(Projected.apply(leaves[0]), *tables, **heads), leaves, upstream, phase)


def bytes_moved(shape: Shape, dtype: torch.dtype, phase: str) -> int:
    """Return the bytes that a phase moves, by the formula in the module docstring."""
    b, t, h, g, d = shape
    one = 2 * b * t * (h + g) * d * dtype.itemsize + 4 * t * d
    return of_phase(phase, one, one)


def of_model(c: ModelConfig, batch: int, block: int) -> tuple[Shape, dict[str, Any]] | None:
    """Return the shape with all columns of a head rotated, whatever the model's rotary_dim."""
    if c.positions != "rope":
        return None
    return (batch, block, c.n_heads, c.kv_heads, c.d_head), {"interleaved": c.rope_interleaved}


BENCH = Bench(
    "rope",
    "BxTxHxGxD",
    ops.rope_qkv,
    Provider("torch", plain),
    job,
    bytes_moved,
    of_model,
    shapes={"cpu": ((4, 256, 12, 12, 64),), "cuda": ((64, 1024, 12, 12, 64), (1, 8192, 32, 8, 128))},
    tiny=(1, 2, 2, 1, 4),
    gate_cases=lambda shape: [((1, min(shape[1], 16), *shape[2:], shape[4] // 2), {"packed": True})],
    others=lambda setting: installed(setting, liger_kernel=liger, flash_attn=flash_attn),
)
pytest_generate_tests, test_rope = _op.pytest_generate_tests, _op.run_benchmark

if __name__ == "__main__":
    sys.exit(run_command(lambda: _command.main(BENCH)))
