"""Cross-entropy over logits (N, V), mean over rows, every row counted.

Bytes, e per logit, n = N V:
    forward             reads logits                                    n e
    backward            reads logits; writes their gradient           2 n e
    both                forward, then backward                        3 n e
    both, in place      reads logits, writes the gradient over them   2 n e
and 20 N for targets (int64), losses and log-sum-exps. GB/s and % of the copy count 2 n e for `both`, for every
provider: a loss and a gradient need no more than that, so reading the logits again shows as a lower rate.
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
from fastgpt.bench._op import Bench, Job, Provider, Setting, Shape, autograd_job, installed
from fastgpt.core.command import run_command
from fastgpt.models.config import ModelConfig


def plain(logits: Tensor, target: Tensor) -> Tensor:
    """Call PyTorch's loss on fp32 logits, as under autocast."""
    return F.cross_entropy(logits.float(), target)


def liger(logits: Tensor, target: Tensor) -> Tensor:
    """Call Liger-Kernel; it writes the gradient over the logits in forward."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits, target)


def quack(logits: Tensor, target: Tensor) -> Tensor:
    """Call quack."""
    from quack import cross_entropy

    return cross_entropy(logits, target, reduction="mean")


def flash_attn(logits: Tensor, target: Tensor) -> Tensor:
    """Call flash-attn, which returns a loss per row."""
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return cross_entropy_loss(logits, target)[0].mean()


def apex(logits: Tensor, target: Tensor) -> Tensor:
    """Call apex, which returns a loss per row in fp32 (no smoothing, -100 ignored)."""
    from apex.contrib.xentropy import SoftmaxCrossEntropyLoss

    return SoftmaxCrossEntropyLoss.apply(logits, target, 0.0, -100, logits.dtype != torch.float32).mean()


def job(provider: Provider, setting: Setting, phase: str, seed: int) -> Job:
    """Return one call over its own logits and targets; in place: the logits are restored before each call, untimed."""
    n, v = setting.shape
    logits, target = setting.random(n, v, seed=seed, grad=True), setting.tokens(v, n, seed=seed)
    one = torch.ones((), device=setting.device)
    if not provider.in_step:
        return autograd_job(lambda: provider.fn(logits, target), [logits], [one], phase)
    saved = logits.detach().clone()
    run = autograd_job(lambda: provider.fn(logits.view_as(logits), target), [logits], [one], phase).run
    return Job(run, lambda: logits.detach().copy_(saved))


def bytes_moved(shape: Shape, dtype: torch.dtype, phase: str) -> int:
    """Return the bytes that a phase moves, by the formula in the module docstring."""
    n, v = shape
    return n * v * dtype.itemsize * (1 if phase == "forward" else 2) + 20 * n


def of_model(c: ModelConfig, batch: int, block: int) -> tuple[Shape, dict[str, Any]] | None:
    """Return the shape of a loss after a head that computes all logits: the reference of linear_cross_entropy."""
    options = {"vocab_size": c.vocab_size, "softcap": c.logit_softcap}
    return (batch * block, c.padded_vocab_size), options


BENCH = Bench(
    "cross_entropy",
    "NxV",
    ops.cross_entropy,
    Provider("torch", plain),
    job,
    bytes_moved,
    of_model,
    shapes={"cpu": ((256, 4096),), "cuda": ((8192, 50304), (4096, 128256))},
    tiny=(1, 8),
    gate_cases=lambda shape: [((min(shape[0], 4), shape[1]), {"inplace": inplace}) for inplace in (False, True)],
    in_step=("in place", functools.partial(ops.cross_entropy, inplace=True)),
    others=lambda setting: installed(setting, liger_kernel=liger, quack=quack, flash_attn=flash_attn, apex=apex),
    within="linear_cross_entropy",
)
pytest_generate_tests, test_cross_entropy = _op.pytest_generate_tests, _op.run_benchmark

if __name__ == "__main__":
    sys.exit(run_command(lambda: _command.main(BENCH)))
