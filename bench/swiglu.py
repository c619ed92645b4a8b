"""silu(gate) * up from one packed tensor (N, 2F), gate first, at (N, F).

Bytes, e per element, n = N F:
    forward   reads gate, up; writes y                 3 n e
    backward  reads dy, gate, up; writes dgate, dup    5 n e
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
from fastgpt.models.config import GATED, ModelConfig
from fastgpt.ops.swiglu import swiglu_torch


def job(provider: Provider, setting: Setting, phase: str, seed: int) -> Job:
    """Return one call over its own packed tensor (for other libraries, which take two tensors, over its separate
    halves)."""
    n, f = setting.shape
    apart = provider.fn in (liger, flash_attn)
    leaves = setting.tensors(seed, *([(n, f)] * 2 if apart else [(n, 2 * f)]), grad=True)
    return autograd_job(lambda: provider.fn(*leaves), leaves, setting.tensors(seed, (n, f)), phase)


def bytes_moved(shape: Shape, dtype: torch.dtype, phase: str) -> int:
    """Return the bytes that a phase moves, by the formula in the module docstring."""
    n = shape[0] * shape[1] * dtype.itemsize
    return of_phase(phase, 3 * n, 5 * n)


def of_model(c: ModelConfig, batch: int, block: int) -> tuple[Shape, dict[str, Any]] | None:
    """Return the shape of the MLP's activation."""
    return ((batch * block, c.d_mlp), {"activation": GATED[c.activation]}) if c.activation in GATED else None


def liger(gate: Tensor, up: Tensor) -> Tensor:
    """Call Liger-Kernel."""
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu(gate, up)


def flash_attn(gate: Tensor, up: Tensor) -> Tensor:
    """Call flash-attn."""
    from flash_attn.ops.activations import swiglu

    return swiglu(gate, up)


BENCH = Bench(
    "swiglu",
    "NxF",
    ops.swiglu,
    Provider("torch", swiglu_torch),
    job,
    bytes_moved,
    of_model,
    shapes={"cpu": ((1024, 2048),), "cuda": ((65536, 2048), (8192, 14336))},
    tiny=(1, 8),
    gate_cases=lambda shape: [((min(shape[0], 64), 2 * shape[1]), {"packed": True})],
    others=lambda setting: installed(setting, liger_kernel=liger, flash_attn=flash_attn),
)
pytest_generate_tests, test_swiglu = _op.pytest_generate_tests, _op.run_benchmark

if __name__ == "__main__":
    sys.exit(run_command(lambda: _command.main(BENCH)))
