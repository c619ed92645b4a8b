"""Cross-entropy over logits (N, V), mean over rows, every row counted.

Bytes, e per logit, n = N V:
    forward             reads logits                                    n e
    backward            reads logits; writes their gradient           2 n e
    both                forward, then backward                        3 n e
    both, in place      reads logits, writes the gradient over them   2 n e
and 20 N for targets (int64), losses and log-sum-exps. GB/s and % of the copy count 2 n e for `both`, for everyone: a
loss and a gradient need no more than that, so a provider that reads the logits again shows it.
"""

from __future__ import annotations

import functools
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


def plain(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """PyTorch's own, on fp32 logits, as under autocast."""
    return torch.nn.functional.cross_entropy(logits.float(), target)


def job(provider: Provider, setting: Setting, phase: str, seed: int) -> Job:
    """One call over its own logits and targets; in place: the logits are restored before each call, untimed."""
    n, v = setting.shape
    logits = setting.random(n, v, seed=2 * seed, grad=True)
    generator = torch.Generator(setting.device).manual_seed(2 * seed + 1)
    target = torch.randint(0, v, (n,), generator=generator, device=setting.device)
    one = torch.ones((), device=setting.device)
    if not provider.inplace:
        return autograd_job(lambda: provider.fn(logits, target), [logits], [one], phase)
    saved = logits.detach().clone()
    run = autograd_job(lambda: provider.fn(logits.view_as(logits), target), [logits], [one], phase).run
    return Job(run, lambda: logits.detach().copy_(saved))


def bytes_moved(shape: Shape, dtype: torch.dtype, phase: str) -> int:
    """The formula at this file's head."""
    n, v = shape
    return n * v * dtype.itemsize * (1 if phase == "forward" else 2) + 20 * n


def providers(setting: Setting, compile: bool) -> list[Provider]:
    """Our backends, out of place and in place, PyTorch's F.cross_entropy, and torch.compile of it."""
    inplace = functools.partial(ops.cross_entropy, inplace=True)
    found = [
        *ours("cross_entropy", setting.device, ops.cross_entropy),
        *ours("cross_entropy", setting.device, inplace, inplace=True, phases=("both",)),
        Provider("torch", plain),
    ]
    return [*found, compiled(plain)] if compile else found


BENCH = Bench(
    "cross_entropy",
    ("forward", "backward", "both"),
    job,
    bytes_moved,
    providers,
    gate_cases=lambda shape: [((min(shape[0], 4), shape[1]), {"inplace": inplace}) for inplace in (False, True)],
    shapes={"cpu": (256, 4096), "cuda": (8192, 50304)},
    tiny=(1, 8),
)


def test_cross_entropy(benchmark: Any, provider: Provider, phase: str, shape: Shape) -> None:
    """pytest bench --benchmark-only"""
    run_benchmark(benchmark, BENCH, provider, phase, shape)


if __name__ == "__main__":
    sys.exit(main(BENCH))
