"""Frozen 8-bit and 4-bit weights under adapters (QLoRA).

    int8   w = s round(w / s), s = max |w| / 127 of a row                    1 byte, and 4 for each row
    nf4    16 levels, quantiles of the normal distribution, times a scale    4.13 bits; by bitsandbytes
           for each 64 elements, which is itself kept in 8 bits

A product makes the weight of its layer dense, in the dtype of the input, and frees it; backward does so again. So
gradients of inputs and adapters are exactly those of the dense weights. The LM head, embeddings, norms and biases stay
as they are. Stored weights are not part of the state_dict: the same base is quantised to the same values again.

Source: Dettmers et al. 2023 (arXiv:2305.14314).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.core.errors import UserError
from fastgpt.inference.weights import quantise
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.models.weights.segments import linear_layers, lora_layers
from fastgpt.nn import Linear
from fastgpt.nn.lora import FrozenLinear

KINDS = ("int8", "nf4")
BLOCK, SCALES = 64, 256  # nf4: elements for each scale, scales for each scale of scales; as in the paper


class Int8(nn.Module):
    """A weight (F, C) in 8 bits, with a scale for each row."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape, self.dtype = (weight.shape[0], weight.shape[1]), weight.dtype
        rows, scale = quantise(weight)
        self.register_buffer("weight", rows, persistent=False)
        self.register_buffer("scale", scale.view(torch.int32), persistent=False)  # a cast of the model leaves it alone

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, (F, C)."""
        wide = torch.promote_types(dtype, torch.float32)
        return self.weight.to(wide).mul_(self.scale.view(torch.float32)[:, None]).to(dtype)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scale.nbytes


class Nf4(nn.Module):
    """A weight (F, C) in 4 bits, in the form of bitsandbytes."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape, self.dtype = (weight.shape[0], weight.shape[1]), weight.dtype
        options: dict[str, Any] = dict(blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
        # in rows of one block: on a CPU bitsandbytes 0.50 restores other rows wrongly (findings/bitsandbytes_rows.sh)
        rows = weight.detach().reshape((-1, BLOCK) if weight.numel() % BLOCK == 0 else (-1,))
        packed, self.state = library().quantize_4bit(rows.contiguous(), **options)
        self.register_buffer("weight", packed, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Nf4:
        super()._apply(fn, recurse)
        self.state.to(self.weight.device)
        return self

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, (F, C)."""
        w: Tensor = library().dequantize_4bit(self.weight, self.state)
        return w.view(self.shape).to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the values and their scales; tables of levels, 1 KB, are left out."""
        return int(self.weight.nbytes + self.state.absmax.nbytes + self.state.state2.absmax.nbytes)


@contextmanager
def _without_downloads() -> Iterator[None]:
    """Hide the package `kernels`, with which bitsandbytes downloads and loads a kernel while it is imported on a CPU
    with bf16 instructions, and its warning that it could not."""
    log, absent = logging.getLogger("bitsandbytes"), object()
    held, level = sys.modules.get("kernels", absent), log.level
    sys.modules["kernels"] = None  # type: ignore[assignment]
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
        del sys.modules["kernels"]
        if held is not absent:
            sys.modules["kernels"] = held  # type: ignore[assignment]


def library() -> Any:
    """Return bitsandbytes.functional.

    Raises:
        UserError: it is not installed, or does not work here.
    """
    if (found := sys.modules.get("bitsandbytes.functional")) is not None:
        return found
    try:
        with _without_downloads():
            import bitsandbytes.functional
    except ImportError as e:
        if e.name and e.name.partition(".")[0] != "bitsandbytes":
            raise UserError(f"nf4 needs bitsandbytes, which cannot be imported ({e})") from e
        raise UserError(
            "nf4 needs bitsandbytes, which is not installed: pip install 'fastgpt[quantised]', or choose int8"
        ) from None
    return bitsandbytes.functional


@torch.no_grad()
def quantise_base(model: GPT, kind: str) -> GPT:
    """Freeze the model and store the weights of its blocks' linear layers in fewer bits, in place, one after the other.

    Cast the model first, to the dtype of its activations; moving it afterwards is fine. Then add adapters.

    Args:
        kind: "int8" or "nf4".

    Returns:
        The model.

    Raises:
        UserError: another kind, a library that is missing, or a model that is quantised or has adapters.
    """
    if kind not in KINDS:
        raise UserError(f"base is {kind!r}, expected one of {', '.join(KINDS)}")
    if lora_layers(model) or any(isinstance(m, FrozenLinear) for m in model.modules()):
        raise UserError("base: the model has adapters or is quantised already, expected a plain model")
    if kind == "nf4":
        library()
        if model.wte.weight.dtype == torch.float64:
            raise UserError("base is 'nf4' and the model is in float64, expected float32, bfloat16 or float16")
    model.requires_grad_(False)
    store = Int8 if kind == "int8" else Nf4
    for name, m in linear_layers(model).items():
        assert isinstance(m, Linear)
        parent, _, leaf = name.rpartition(".")
        layer = FrozenLinear(store(m.weight), m.bias)  # type: ignore[arg-type]
        setattr(model.get_submodule(parent), leaf, layer.train(m.training))
    return model


def base_bytes(c: ModelConfig, kind: str | None, dtype: torch.dtype) -> int:
    """Return the bytes of a base model's parameters, for a plan; no memory is allocated.

    Args:
        kind: as in `quantise_base`, or None for a base in `dtype`.
        dtype: of the weights that are not quantised.
    """
    with torch.device("meta"):
        model = GPT(c)
    every = sum(p.numel() for p in model.parameters())
    matrices = [(m.out_features, m.in_features) for m in linear_layers(model).values() if isinstance(m, Linear)]
    return stored_bytes(every, matrices, kind, dtype)


def stored_bytes(every: int, matrices: Sequence[tuple[int, int]], kind: str | None, dtype: torch.dtype) -> int:
    """Return the bytes of a base of `every` elements, of which `matrices` (rows, columns) may be quantised."""
    if kind is None:
        return every * dtype.itemsize
    rest = every - sum(rows * columns for rows, columns in matrices)
    return rest * dtype.itemsize + sum(matrix_bytes(rows, columns, kind) for rows, columns in matrices)


def matrix_bytes(rows: int, columns: int, kind: str) -> int:
    """Return the bytes of a stored weight (rows, columns)."""
    if kind == "int8":
        return rows * columns + 4 * rows
    scales = -(-rows * columns // BLOCK)
    return -(-rows * columns // 2) + scales + 4 * -(-scales // SCALES)
