"""Forward KL between two heads, mean over rows, at (N, C, V); the teacher has the student's width.

FLOP: 4 N C V for both logits, 4 N C V for the student's gradients. An op that computes its gradients in forward does
more work there and less in backward: `both` is the figure to compare.
Bytes without logits, e per element:
    forward   reads x and weight of both                       2 (N C e + V C e)
    backward  reads the student's; writes dx, dweight          2 (N C e + V C e)
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.bench import _command, _op
from fastgpt.bench._op import Bench, Job, Provider, Setting, Shape, autograd_job, of_phase
from fastgpt.core.command import run_command
from fastgpt.models.config import ModelConfig


def plain(x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor) -> Tensor:
    """Call PyTorch's loss with all logits of both in memory, in fp32 as under autocast."""
    logq = F.linear(x, weight).float().log_softmax(-1)
    logp = F.linear(teacher_x, teacher_weight).float().log_softmax(-1)
    return F.kl_div(logq, logp, reduction="batchmean", log_target=True)


def job(provider: Provider, setting: Setting, phase: str, seed: int) -> Job:
    """Return one call over its own tensors; weights are scaled so that logits are around one."""
    n, c, v = setting.shape
    leaves = x, weight = setting.tensors(seed, (n, c), (v, c), grad=True)
    teacher_x, teacher_weight = setting.tensors(seed + 1000, (n, c), (v, c))
    weight.data.mul_(c**-0.5)
    teacher_weight.mul_(c**-0.5)
    one = torch.ones((), device=setting.device)
    return autograd_job(lambda: provider.fn(x, weight, teacher_x, teacher_weight), leaves, [one], phase)


def bytes_moved(shape: Shape, dtype: torch.dtype, phase: str) -> int:
    """Return the bytes that a phase moves, by the formula in the module docstring."""
    n, c, v = shape
    both = 2 * (n + v) * c * dtype.itemsize
    return of_phase(phase, both, both)


def flops(shape: Shape, phase: str) -> float:
    """Return the FLOP of a phase, by the formula in the module docstring."""
    n, c, v = shape
    return of_phase(phase, 4.0 * n * c * v, 4.0 * n * c * v)


def of_model(c: ModelConfig, batch: int, block: int) -> tuple[Shape, dict[str, Any]] | None:
    """Return None: a model that is pretrained has no teacher."""
    return None


BENCH = Bench(
    "linear_divergence",
    "NxCxV",
    ops.linear_divergence,
    Provider("torch", plain),
    job,
    bytes_moved,
    of_model,
    shapes={"cpu": ((256, 256, 4096),), "cuda": ((16384, 768, 50304), (8192, 4096, 128256))},
    tiny=(2, 8, 16),
    gate_cases=lambda shape: [((min(shape[0], 4), *shape[1:]), {"reduction": "mean"})],
    flops=flops,
)
pytest_generate_tests, test_linear_divergence = _op.pytest_generate_tests, _op.run_benchmark

if __name__ == "__main__":
    sys.exit(run_command(lambda: _command.main(BENCH)))
