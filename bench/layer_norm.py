"""LayerNorm with residual, s = x + residual, y = norm(s) weight + bias, at (N, C).

Bytes, e per element of x, n = N C (what a norm must move; weights and statistics are counted, too):
    forward   reads x, residual; writes y, s           4 n e + 2 C e + 8 N
    backward  reads dy, ds, s; writes dx               4 n e + 4 C e + 8 N
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from fastgpt import ops
from fastgpt.bench._harness import Job, Setting
from fastgpt.bench._op import (
    Bench,
    Provider,
    Shape,
    autograd_job,
    compiled,
    main,
    ours,
    pytest_generate_tests,  # noqa: F401
    run_benchmark,
)
from fastgpt.ops.layer_norm import layer_norm_torch


def job(provider: Provider, setting: Setting, phase: str, seed: int) -> Job:
    """One call over its own x, residual, weight, bias and upstream gradients."""
    n, c = setting.shape
    shapes = ((n, c), (n, c), (c,), (c,))
    leaves = [setting.random(*shape, seed=8 * seed + i, grad=True) for i, shape in enumerate(shapes)]
    grads = [setting.random(n, c, seed=8 * seed + i) for i in (4, 5)]
    x, residual, weight, bias = leaves
    return autograd_job(lambda: provider.fn(x, weight, bias, 1e-5, residual=residual), leaves, grads, phase)


def bytes_moved(shape: Shape, dtype: torch.dtype, phase: str) -> int:
    """The formula at this file's head."""
    n, c = shape
    forward = (4 * n * c + 2 * c) * dtype.itemsize + 8 * n
    backward = (4 * n * c + 4 * c) * dtype.itemsize + 8 * n
    return {"forward": forward, "backward": backward, "both": forward + backward}[phase]


def providers(setting: Setting, compile: bool) -> list[Provider]:
    """Our backends, PyTorch's add and F.layer_norm, and torch.compile of these."""
    found = [*ours("layer_norm", setting.device, ops.layer_norm), Provider("torch", layer_norm_torch)]
    return [*found, compiled(layer_norm_torch)] if compile else found


BENCH = Bench(
    "layer_norm",
    ("forward", "backward", "both"),
    job,
    bytes_moved,
    providers,
    gate_cases=lambda shape: [((min(shape[0], 64), shape[1]), {"residual": True})],
    shapes={"cpu": (1024, 768), "cuda": (65536, 768)},
    tiny=(1, 8),
)


def test_layer_norm(benchmark: Any, provider: Provider, phase: str, shape: Shape) -> None:
    """pytest bench --benchmark-only"""
    run_benchmark(benchmark, BENCH, provider, phase, shape)


if __name__ == "__main__":
    sys.exit(main(BENCH))
