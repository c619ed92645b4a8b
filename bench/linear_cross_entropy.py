"""LM head and loss, mean of cross_entropy(x weight^T, target), at (N, C, V).

FLOP: forward 2 N C V, backward 4 N C V. An op that computes its gradients in forward does more work there and less in
backward: `both` is the figure to compare.
Bytes without logits, e per element:
    forward   reads x, weight, targets                           N C e + V C e + 8 N
    backward  the same again; writes dx, dweight             2 (N C e + V C e) + 8 N
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.bench import _command, _op
from fastgpt.bench._op import Bench, Job, Provider, Setting, Shape, autograd_job, installed, of_phase
from fastgpt.core.command import run_command
from fastgpt.models.config import ModelConfig


def plain(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Call PyTorch's loss with all logits in memory, in fp32 as under autocast."""
    return F.cross_entropy(F.linear(x, weight).float(), target)


def torch_chunked(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Call the chunked op of torch 2.13; its gradients can be computed only once."""
    return F.linear_cross_entropy(x, weight, target, options=torch.nn.LinearCrossEntropyOptions())


def liger(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Call Liger-Kernel."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(x, weight, target)


def cut_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Call Apple's cut-cross-entropy without its gradient filter, for an exact gradient."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, weight, target, filter_eps=None)


def quack(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Call quack, in chunks of rows."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(x, weight, target)


def job(provider: Provider, setting: Setting, phase: str, seed: int) -> Job:
    """Return one call over its own x, weight (scaled so that logits are around one) and targets."""
    n, c, v = setting.shape
    leaves = x, weight = setting.tensors(seed, (n, c), (v, c), grad=True)
    weight.data.mul_(c**-0.5)
    target, one = setting.tokens(v, n, seed=seed), torch.ones((), device=setting.device)
    return autograd_job(lambda: provider.fn(x, weight, target), leaves, [one], phase)


def bytes_moved(shape: Shape, dtype: torch.dtype, phase: str) -> int:
    """Return the bytes that a phase moves, by the formula in the module docstring."""
    n, c, v = shape
    one = (n + v) * c * dtype.itemsize
    return of_phase(phase, one + 8 * n, 2 * one + 8 * n)


def flops(shape: Shape, phase: str) -> float:
    """Return the FLOP of a phase, by the formula in the module docstring."""
    n, c, v = shape
    return of_phase(phase, 2.0 * n * c * v, 4.0 * n * c * v)


def of_model(c: ModelConfig, batch: int, block: int) -> tuple[Shape, dict[str, Any]] | None:
    """Return the shape of head and loss over the padded vocabulary."""
    options = {"vocab_size": c.vocab_size, "softcap": c.logit_softcap}
    return (batch * block, c.width, c.padded_vocab_size), options


def others(setting: Setting) -> list[Provider]:
    """Return torch's chunked op where this torch has it, Liger-Kernel, cut-cross-entropy and quack."""
    here = hasattr(torch.nn, "LinearCrossEntropyOptions")
    own = [Provider("torch chunked", torch_chunked, phases=("both",))] if here else []
    return [*own, *installed(setting, liger_kernel=liger, cut_cross_entropy=cut_cross_entropy, quack=quack)]


BENCH = Bench(
    "linear_cross_entropy",
    "NxCxV",
    ops.linear_cross_entropy,
    Provider("torch", plain),
    job,
    bytes_moved,
    of_model,
    shapes={"cpu": ((256, 256, 4096),), "cuda": ((16384, 768, 50304), (8192, 4096, 128256))},
    tiny=(2, 8, 16),
    gate_cases=lambda shape: [((min(shape[0], 4), *shape[1:]), {"reduction": "mean"})],
    flops=flops,
    others=others,
)
pytest_generate_tests, test_linear_cross_entropy = _op.pytest_generate_tests, _op.run_benchmark

if __name__ == "__main__":
    sys.exit(run_command(lambda: _command.main(BENCH)))
