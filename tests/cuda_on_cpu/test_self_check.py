"""The check at first use runs every kernel that training calls by default, not only the quickest ones."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.core import backend
from fastgpt.optim import AdamW

if importlib.util.find_spec("pybind11") is None or shutil.which("g++") is None:
    pytest.skip("needs pybind11 and g++", allow_module_level=True)
if not backend.simulated("cuda"):
    pytest.skip("the emulation is not this process's backend", allow_module_level=True)

import emulator

BF16, N = torch.bfloat16, 40  # tokens


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(BF16).requires_grad_()


def norm(op: Callable[..., Any], n_cols: int, n_affine: int) -> None:
    for x_bias in (None, rand(n_cols)):
        affine = [rand(n_cols) for _ in range(n_affine)]
        out = op(rand(N, n_cols), *affine, residual=rand(N, n_cols), x_bias=x_bias)
        torch.autograd.backward(out, [torch.ones_like(t) for t in out])


def attend(n_heads: int, n_kv_heads: int, dim: int) -> None:
    qkv = rand(1, N, n_heads + 2 * n_kv_heads, dim)
    ops.attention_qkv(qkv, n_heads=n_heads, n_kv_heads=n_kv_heads, causal=True).sum().backward()


def decode(n_heads: int, n_kv_heads: int, dim: int) -> None:
    with torch.no_grad():
        q, k, v = rand(1, 1, n_heads, dim), rand(1, N, n_kv_heads, dim), rand(1, N, n_kv_heads, dim)
        ops.attention_decode(q, k, v)
        k, v = (x.view(N // 8, 8, n_kv_heads, dim) for x in (k, v))
        ops.attention_decode(q, k, v, pages=torch.arange(N // 8)[None])


def turn(n_heads: int, n_kv_heads: int, dim: int) -> None:
    qkv, table = rand(1, N, n_heads + 2 * n_kv_heads, dim), torch.ones(N, dim // 2)
    ops.rope_qkv(qkv * 1, table, table, n_heads=n_heads, n_kv_heads=n_kv_heads).sum().backward()


def embed(positions: bool) -> None:
    ids = torch.arange(4 * N).view(4, N) % 50
    ops.embedding(ids, rand(64, 768), rand(N, 768) if positions else None).sum().backward()


def lose(vocabulary: int) -> None:
    ops.cross_entropy(rand(3, vocabulary), torch.tensor([0, 5, 50]), vocab_size=vocabulary - 47).backward()
    weight, x = rand(vocabulary, 8), rand(3, 8)
    ops.linear_cross_entropy(x, weight, torch.tensor([0, 5, 50]), vocab_size=vocabulary - 47).backward()


def step() -> None:
    params = [torch.nn.Parameter(rand(n).detach()) for n in (1300, 7)]
    for p in params:
        p.grad = torch.ones_like(p)
    AdamW(params, lr=0.1, max_norm=1.0).step()


# What GPT-2 and Llama call in bf16, at their widths: in a training step, and when they generate
CALLS: dict[str, list[Callable[[], None]]] = {
    "layer_norm": [lambda: norm(ops.layer_norm, 768, 2), lambda: norm(ops.layer_norm, 1600, 2)],
    "rms_norm": [lambda: norm(ops.rms_norm, 768, 1), lambda: norm(ops.rms_norm, 4096, 1)],
    "bias_gelu": [lambda: ops.bias_gelu(rand(5, 3072), rand(3072), approximate="tanh").sum().backward()],
    "swiglu": [lambda: ops.swiglu(rand(5, 4096)).sum().backward()],
    "embedding": [lambda: embed(True), lambda: embed(False)],
    "attention": [lambda: attend(12, 12, 64), lambda: attend(8, 2, 128)],
    "attention_decode": [lambda: decode(12, 12, 64), lambda: decode(32, 8, 128), lambda: decode(32, 4, 128)],
    "rope": [lambda: turn(8, 2, 64), lambda: turn(8, 2, 128)],
    "cross_entropy": [lambda: lose(50304), lambda: lose(65664)],
    "adamw": [step],
}


@pytest.mark.parametrize("op", CALLS)
def test_the_self_check_runs_what_models_run(op: str) -> None:
    library = Path(os.environ["FASTGPT_EMULATED_CUDA"])
    kernels = emulator.load(library)
    kernels.launched()
    with backend.use(all="cuda", strict=True):
        for call in CALLS[op]:
            call()
    wanted = set(kernels.launched())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert backend._self_checks[op]("cuda", torch.device("cpu")) <= backend.SELF_CHECK_BOUND
    missing = wanted - set(kernels.launched())
    assert wanted and not missing, sorted(emulator.kernel_names(library)[k] for k in missing)
