"""Causal attention over q (B, T, H, D), k and v (B, T, G, D), at (B, T, H, G, D).

FLOP: forward 4 B H T T D, halved for causal; backward 2.5 times that (five products for two).
Bytes, e per element, q = B T H D, k = B T G D, l = 4 B H T for log-sum-exps:
    forward   reads q, k, v; writes out, lse                         2 q e + 2 k e + l
    backward  reads dout, q, k, v, out, lse; writes dq, dk, dv       4 q e + 4 k e + l
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt import ops
from fastgpt.bench import _command, _op
from fastgpt.bench._op import Bench, Job, Provider, Setting, Shape, autograd_job, installed, of_phase
from fastgpt.core import backend
from fastgpt.core.command import run_command
from fastgpt.models.config import ModelConfig
from fastgpt.ops._attention_sm90 import HEAD_DIMS, SM90

SDPA = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Call PyTorch's scaled_dot_product_attention with the backend that PyTorch chooses."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2)


def sdpa(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Call scaled_dot_product_attention with one given backend."""
    with sdpa_kernel(kernel):
        return plain(q, k, v)


def flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Call flash-attn."""
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, causal=True)


def flash_attn_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Call flash-attn 3, for Hopper; its first releases also return the log-sum-exp."""
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q, k, v, causal=True)
    return out[0] if isinstance(out, tuple) else out


def job(provider: Provider, setting: Setting, phase: str, seed: int) -> Job:
    """Return one call over its own q, k, v (or packed qkv) and upstream gradient."""
    b, t, h, g, d = setting.shape
    heads = (h + 2 * g,) if provider.in_step else (h, g, g)
    packed = dict(n_heads=h, n_kv_heads=g) if provider.in_step else {}
    leaves = setting.tensors(seed, *((b, t, n, d) for n in heads), grad=True)
    return autograd_job(lambda: provider.fn(*leaves, **packed), leaves, setting.tensors(seed, (b, t, h, d)), phase)


def bytes_moved(shape: Shape, dtype: torch.dtype, phase: str) -> int:
    """Return the bytes that a phase moves, by the formula in the module docstring."""
    b, t, h, g, d = shape
    one, lse = 2 * b * t * (h + g) * d * dtype.itemsize, 4 * b * h * t
    return of_phase(phase, one + lse, 2 * one + lse)


def flops(shape: Shape, phase: str) -> float:
    """Return the FLOP of a phase, by the formula in the module docstring."""
    b, t, h, _, d = shape
    forward = 4.0 * b * h * t * t * d / 2
    return of_phase(phase, forward, 2.5 * forward)


def of_model(c: ModelConfig, batch: int, block: int) -> tuple[Shape, dict[str, Any]] | None:
    """Return the first layer's shape, with the model's window, softcap and scale."""
    window = c.window_of(0)
    options: dict[str, Any] = {"window": window if window is not None and window < block else None}
    options |= {"softcap": c.attn_softcap, "scale": c.score_scale}
    return (batch, block, c.n_heads, c.kv_heads, c.d_head), options


def gate_cases(shape: Shape) -> list[tuple[Shape, dict[str, Any]]]:
    """Return a case with several tiles, one of them masked, at this head dimension."""
    return [((1, 300, 300, 4, 2, shape[4]), {"causal": True})]


def others(setting: Setting) -> list[Provider]:
    """Return the kernels for sm_90a where they can run, the SDPA backends and flash-attn."""
    on_gpu = setting.device.type == "cuda"
    names = SDPA if on_gpu else ("math", "flash")
    found = [Provider(f"sdpa {name}", functools.partial(sdpa, SDPA[name])) for name in names]
    if on_gpu and setting.shape[4] in HEAD_DIMS and not backend.refusal("attention", SM90, "cuda", setting.dtype):
        found.append(Provider(SM90, BENCH.public, SM90))
    return [*found, *installed(setting, flash_attn=flash_attn, flash_attn_interface=flash_attn_3)]


BENCH = Bench(
    "attention",
    "BxTxHxGxD",
    functools.partial(ops.attention, causal=True),
    Provider("torch", plain),
    job,
    bytes_moved,
    of_model,
    shapes={"cpu": ((1, 512, 12, 12, 64),), "cuda": ((16, 1024, 12, 12, 64), (1, 8192, 32, 8, 128))},
    tiny=(1, 2, 2, 1, 16),
    gate_cases=gate_cases,
    flops=flops,
    in_step=("packed", functools.partial(ops.attention_qkv, causal=True)),
    others=others,
)
pytest_generate_tests, test_attention = _op.pytest_generate_tests, _op.run_benchmark

if __name__ == "__main__":
    sys.exit(run_command(lambda: _command.main(BENCH)))
