"""AdamW with clipping: one optimizer step over all parameters of a GPT-2 of L layers, width C and vocabulary V.

Bytes per parameter (norm: reads g; update: reads g, p, m, v; writes p, m, v), whatever the provider:
    fp32        4 + 16 + 12 = 32
    16 bits     2 + (2 + 2 + 12) + (12 + 2) = 32: fp32 master and moments, the 16-bit copy read and written
PyTorch's side is clip_grad_norm_ and AdamW(fused=True); with --dtype bf16 it keeps fp32 parameters and gradients, as a
trainer under autocast does: no PyTorch optimizer keeps fp32 masters of bf16 parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.bench import _command, _op
from fastgpt.bench._op import Bench, Job, Provider, Setting, Shape, installed
from fastgpt.core.command import run_command
from fastgpt.models.config import ModelConfig
from fastgpt.optim import AdamW

POSITIONS, MAX_NORM = 1024, 1.0
SETTINGS: dict[str, Any] = dict(lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)


def parameter_shapes(layers: int, width: int, vocab: int) -> list[Shape]:
    """Return the shapes of a GPT-2's parameters, both tables included (V = 1: one row each, as if without tables)."""
    tables = [(vocab, width), (POSITIONS, width)] if vocab > 1 else [(1, width)]
    one = [(3, 1), (1, 1), (4, 1), (1, 4)]  # matrices of a layer, in widths: qkv, proj, up, down
    matrices = [s for a, b in one for s in ((a * width, b * width), (a * width,))]
    return [*tables, *(layers * [*matrices, *(4 * [(width,)])]), (width,), (width,)]


def fastgpt_step(params: list[nn.Parameter]) -> Callable[[], Any]:
    """Return a step of fastgpt's optimizer, clipping included."""
    return AdamW(params, max_norm=MAX_NORM, **SETTINGS).step


def torch_step(params: list[nn.Parameter]) -> Callable[[], Any]:
    """Return a step of PyTorch's fused optimizer after clip_grad_norm_."""
    cuda = params[0].is_cuda
    optimizer = torch.optim.AdamW(params, fused=True, capturable=cuda, **SETTINGS)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()

    return step


def apex_step(params: list[nn.Parameter]) -> Callable[[], Any]:
    """Return a step of apex's multi-tensor optimizer after clip_grad_norm_."""
    from apex.optimizers import FusedAdam

    optimizer = FusedAdam(params, adam_w_mode=True, capturable=True, **SETTINGS)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()

    return step


def job(provider: Provider, setting: Setting, phase: str, seed: int) -> Job:
    """Return a step over newly allocated parameters and gradients."""
    dtype = setting.dtype if provider.backend else torch.float32

    def tensor(shape: Shape, number: int, scale: float) -> Tensor:
        return (setting.random(*shape, seed=1000 * seed + number, dtype=torch.float32) * scale).to(dtype)

    shapes = parameter_shapes(*setting.shape)
    params = [nn.Parameter(tensor(shape, i, 0.02)) for i, shape in enumerate(shapes)]
    for i, p in enumerate(params):
        p.grad = tensor(tuple(p.shape), 500 + i, 1e-4)
    return Job(provider.fn(params))


def bytes_moved(shape: Shape, dtype: torch.dtype, phase: str) -> int:
    """Return the bytes that a phase moves, by the formula in the module docstring."""
    count = sum(torch.Size(s).numel() for s in parameter_shapes(*shape))
    return count * 32


def of_model(c: ModelConfig, batch: int, block: int) -> tuple[Shape, dict[str, Any]] | None:
    """Return four layers in place of all: the step's time is linear in the elements."""
    return (min(4, c.n_layers), c.width, c.padded_vocab_size), {}


BENCH = Bench(
    "adamw",
    "LxCxV",
    fastgpt_step,
    Provider("torch fused", torch_step),
    job,
    bytes_moved,
    of_model,
    shapes={"cpu": ((4, 128, 50304),), "cuda": ((12, 768, 50304), (1, 4096, 1))},
    tiny=(1, 8, 1),
    gate_cases=lambda shape: [((4 * shape[1], shape[1]), {"max_norm": 0.5})],
    phases=("step",),
    others=lambda setting: installed(setting, apex=apex_step),
)
pytest_generate_tests, test_adamw = _op.pytest_generate_tests, _op.run_benchmark

if __name__ == "__main__":
    sys.exit(run_command(lambda: _command.main(BENCH)))
