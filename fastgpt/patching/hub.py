"""Layers for Hugging Face's `kernels` library, and the folder that it loads them from.

`write_repository(folder)` writes a kernel repository whose only build, for every device, is the installed fastgpt. Then
`LocalLayerRepository(repo_path=folder, layer_name="RMSNorm")` in a kernel mapping replaces the forward of every layer
registered under this name by `RMSNorm.forward` (transformers registers its norms and activations). By the rules of the
library, a layer has no constructor and no attributes; it reads those of the module that it replaces.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from fastgpt import ops

LAYERS = ("RMSNorm", "NewGELU", "GeluTanh", "GeLU")  # the names that transformers uses


class RMSNorm(nn.Module):
    """RMSNorm as in Llama: weight and variance_epsilon. x: (..., C)."""

    weight: Tensor
    variance_epsilon: float
    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class NewGELU(nn.Module):
    """GELU as in GPT-2, with tanh."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return ops.bias_gelu(input, approximate="tanh")


class GeluTanh(NewGELU):
    """The same GELU, under PyTorch's name for the formula."""


class GeLU(nn.Module):
    """GELU with erf."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return ops.bias_gelu(input)


def write_repository(folder: Path | str) -> Path:
    """Write a kernel repository for this Python environment; return its build folder.

    Args:
        folder: created if it does not exist; `build/torch-universal` in it is (over)written.

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
