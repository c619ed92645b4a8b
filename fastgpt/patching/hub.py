"""Layers for Hugging Face's `kernels` library, and the folder that it loads them from.

`write_repository(folder)` makes a kernel repository whose one build, for every device, is the installed fastgpt; then
`LocalLayerRepository(repo_path=folder, layer_name="RMSNorm")` in a kernel mapping puts `RMSNorm.forward` in the place
of every layer registered under this name (transformers registers its norms and activations). By the library's rules a
layer has no constructor and no attributes of its own: it reads those of the module whose place it takes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from fastgpt import ops

LAYERS = ("RMSNorm", "NewGELU", "GeluTanh", "GeLU")  # under transformers' names


class RMSNorm(nn.Module):
    """Llama's: weight and variance_epsilon. x: (..., C)."""

    weight: Tensor
    variance_epsilon: float
    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class NewGELU(nn.Module):
    """GPT-2's GELU, by tanh."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return ops.bias_gelu(input, approximate="tanh")


class GeluTanh(NewGELU):
    """The same, under the name of PyTorch's formula for it."""


class GeLU(nn.Module):
    """GELU by erf."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return ops.bias_gelu(input)


def write_repository(folder: Path | str) -> Path:
    """Write a kernel repository for this Python environment; returns its build folder.

    Args:
        folder: made if it is not there; `build/torch-universal` in it is (re)written.

    Raises:
        OSError: the folder cannot be written.
    """
    build = Path(folder) / "build" / "torch-universal"
    build.mkdir(parents=True, exist_ok=True)
    backend = "cuda" if torch.cuda.is_available() else "cpu"
    about = {"id": "_fastgpt", "name": "fastgpt", "version": 1, "license": "MIT", "backend": {"type": backend}}
    text = json.dumps({**about, "python-depends": []}, indent=1)
    (build / "metadata.json").write_text(text + "\n", encoding="utf-8")
    (build / "__init__.py").write_text("from fastgpt.patching import hub as layers  # noqa: F401\n", encoding="utf-8")
    return build
