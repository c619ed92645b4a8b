"""Layers for Hugging Face's `kernels` library, and the folder that it loads them from.

`write_repository(folder)` writes a kernel repository whose only build, for every device, is the installed fastgpt. Then
`LocalLayerRepository(repo_path=folder, layer_name="RMSNorm")` in a kernel mapping replaces the forward of every layer
registered under this name by `RMSNorm.forward`. LAYERS has the names of transformers' default mapping;
`mapping(folder)` returns such a mapping with these layers.

By the rules of the library, a layer has no constructor and no attributes but has_backward and can_torch_compile; it
reads the attributes of the module that it replaces. The ops are those of the installed package: one library for the
stable ABI, the namespace `fastgpt`. metadata.json has the version and the SHA-256 of every file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt._version import __version__
from fastgpt.patching._rope import recognise, turn


class RMSNorm(nn.Module):
    """RMSNorm as in Llama: weight and variance_epsilon. x: (..., C)."""

    weight: Tensor
    variance_epsilon: float
    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class RMSNormZeroCentered(nn.Module):
    """RMSNorm with 1 + weight, as in Qwen 3.5: weight and eps. x: (..., C)."""

    weight: Tensor
    eps: float
    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, weight_offset=1.0)


class SwiGLUMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), as in Llama: gate_proj, up_proj, down_proj. x: (..., C)."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return]


class GeGLUMLP(nn.Module):
    """down(gelu(gate(x)) * up(x)) with the tanh formula, as in Gemma: gate_proj, up_proj, down_proj. x: (..., C)."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        y = ops.swiglu(self.gate_proj(x), self.up_proj(x), activation="gelu_tanh")
        return self.down_proj(y)  # type: ignore[no-any-return]


class NewGELU(nn.Module):
    """GELU as in GPT-2, with tanh."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return ops.bias_gelu(input, approximate="tanh")


class GeluTanh(NewGELU):
    """The same GELU, under PyTorch's name for the formula."""


class FastGELU(NewGELU):
    """The same GELU, with the product inside tanh written in another order."""


class GeLU(nn.Module):
    """GELU with erf."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return ops.bias_gelu(input)


@torch.compiler.assume_constant_result
def _turning(cls: type) -> tuple[str, bool, int] | None:
    """Return layout, interleaved and sign, as in Rotation, of the function that a layer was made from; None if the op
    does not have it. The function is what its forward closes over."""
    if cls is RotaryPosEmb:
        return "halves", False, 1
    values = (cell.cell_contents for cell in cls.forward.__closure__ or ())  # type: ignore[attr-defined]
    r = next((recognise(f) for f in values if isinstance(f, types.FunctionType)), None)
    return None if r is None or r.unzipped else (r.layout, r.interleaved, r.sign)


class RotaryPosEmb(nn.Module):
    """transformers' apply_rotary_pos_emb: q (B, H, T, D), k (B, Hkv, T, D), cos and sin (B, T, columns).

    Model files register different rotations under this name, so the one that is replaced decides on pairs and columns;
    the layer by itself has half pairing, and rotary_dim columns.
    """

    has_backward = True
    can_torch_compile = True

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        turning = _turning(type(self))
        if turning is None:
            return type(self).forward(self, q, k, cos, sin, unsqueeze_dim)
        layout, interleaved, sign = turning
        swap = unsqueeze_dim == 1
        q, k = (t.transpose(1, 2) if swap else t for t in (q, k))  # (B, T, H, D)
        q, k = turn([q, k], cos, sin if sign == 1 else -sin, layout, interleaved)
        return (q.transpose(1, 2), k.transpose(1, 2)) if swap else (q, k)


class ForCausalLMLoss(nn.Module):
    """transformers' ForCausalLMLoss: logits (B, T, V) of any dtype, labels (B, T) -> loss, fp32; the logits are not
    copied to fp32."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        target = shift_labels.reshape(-1).to(logits.device)
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = ops.cross_entropy(logits.view(-1, vocab_size), target, ignore_index=ignore_index, reduction=reduction)
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss if num_items_in_batch is None else loss / num_items_in_batch


rotary_pos_emb = RotaryPosEmb  # the name of the layer is that of the function
# transformers' names; not among them: Linear, SiLU and QuickGELU, for which fastgpt has no kernel
LAYERS = (
    "RMSNorm", "RMSNormZeroCentered", "SwiGLUMLP", "GeGLUMLP", "ForCausalLMLoss", "rotary_pos_emb",
    "NewGELU", "GeluTanh", "FastGELU", "GeLU",
)  # fmt: skip


def mapping(folder: Path | str, devices: tuple[str, ...] = ("cuda", "cpu")) -> dict[str, dict[str, Any]]:
    """Return a kernel mapping of every layer, for `kernels.use_kernel_mapping` or `register_kernel_mapping`.

    Args:
        folder: one that `write_repository` wrote.

    Raises:
        ImportError: `kernels` is not installed.
    """
    from kernels import LocalLayerRepository  # type: ignore[attr-defined]

    return {
        name: dict.fromkeys(devices, LocalLayerRepository(repo_path=Path(folder), layer_name=name)) for name in LAYERS
    }


def write_repository(folder: Path | str) -> Path:
    """Write a kernel repository for this Python environment; return its build folder.

    Args:
        folder: created if it does not exist; `build/torch-universal` in it is (over)written.

    Raises:
        OSError: the folder cannot be written.
    """
    build = Path(folder) / "build" / "torch-universal"
    build.mkdir(parents=True, exist_ok=True)
    files = {"__init__.py": b"from fastgpt.patching import hub as layers  # noqa: F401\n"}
    digests = {name: base64.b64encode(hashlib.sha256(data).digest()).decode() for name, data in files.items()}
    backend = "cuda" if torch.cuda.is_available() else "cpu"
    unique = f"_fastgpt_{__version__.replace('.', '_')}_{hashlib.sha256(str(digests).encode()).hexdigest()[:8]}"
    about = {
        "id": unique, "name": "fastgpt", "version": 1, "license": "MIT", "backend": {"type": backend},
        "python-depends": [], "digest": {"algorithm": "sha256", "files": digests},
    }  # fmt: skip
    for name, data in files.items():
        (build / name).write_bytes(data)
    (build / "metadata.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return build
