"""act(gate) * up, forward and backward (Shazeer 2020, arXiv:2002.05202).

    y = act(gate) up,  dgate = dy up act'(gate),  dup = dy act(gate);  act: silu, gelu, relu2, gelu_tanh (_math.py)

Bytes an element: forward reads gate and up, writes y; backward reads dy, gate and up, writes both gradients.
Saved for backward: gate and up. A packed tensor and its gradient are two views of one tensor each.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._math import gelu, gelu_tanh, relu2, silu
from ._runtime import (
    Configuration,
    as_rows,
    cast,
    ceil_pow2,
    interpreted,
    jit_kernel,
    on_device,
    pointers,
    powers_of_two,
    quick_width,
    split_meta,
)

MAX_BLOCK = 1024  # columns per program; wider rows are divided
SILU, GELU, RELU2 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # any other number: gelu_tanh


@triton.jit
def _activation(x, ACT: tl.constexpr):
    """Return value and slope of activation number ACT."""
    if ACT == SILU:
        return silu(x)
    elif ACT == GELU:
        return gelu(x)
    elif ACT == RELU2:
        return relu2(x)
    else:
        return gelu_tanh(x)


@jit_kernel(do_not_specialize=["N"])
def swiglu_fwd_kernel(
    gate_ptr,  # (N, C), rows gate_row apart
    up_ptr,  # (N, C), rows up_row apart
    y_ptr,  # (N, C) contiguous
    gate_row, up_row, N, C, ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute one tile of (ROWS, BLOCK) per program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    mask = (row < N) & (c < C)
    gate = tl.load(gate_ptr + row * gate_row + c, mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + c, mask, other=0.0).to(tl.float32)
    value, _ = _activation(gate, ACT)
    tl.store(y_ptr + row * C + c, cast(value * up, y_ptr.dtype.element_ty), mask)


@jit_kernel(do_not_specialize=["N"])
def swiglu_bwd_kernel(
    dy_ptr,  # (N, C), rows dy_row apart
    gate_ptr,  # (N, C), rows gate_row apart
    up_ptr,  # (N, C), rows up_row apart
    dgate_ptr,  # (N, C), rows grad_row apart
    dup_ptr,  # (N, C), rows grad_row apart
    dy_row, gate_row, up_row, grad_row, N, C, ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute one tile of (ROWS, BLOCK) per program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    mask = (row < N) & (c < C)
    dy = tl.load(dy_ptr + row * dy_row + c, mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_row + c, mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + c, mask, other=0.0).to(tl.float32)
    value, slope = _activation(gate, ACT)
    tl.store(dgate_ptr + row * grad_row + c, cast(dy * up * slope, dgate_ptr.dtype.element_ty), mask)
    tl.store(dup_ptr + row * grad_row + c, cast(dy * value, dup_ptr.dtype.element_ty), mask)


def tile_meta(C: int) -> dict[str, int]:
    """Return a tile of up to 1024 elements, 8 per thread (interpreter: larger)."""
    if interpreted():
        return {"ROWS": 64, "BLOCK": min(ceil_pow2(C), 8192), "num_warps": 4}
    block = min(ceil_pow2(C), MAX_BLOCK)
    return {"ROWS": max(1, 1024 // block), "BLOCK": block, "num_warps": 4}


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return gate and up as rows (N, C): two views of a packed tensor, or two tensors."""
    rows = as_rows(gate)
    if up is not None:
        return rows, as_rows(up)
    C = rows.shape[1] // 2
    return rows[:, :C], rows[:, C:]


def swiglu_fwd(gate: Tensor, up: Tensor | None, activation: int) -> Tensor:
    """Return y, contiguous."""
    width = gate.shape[-1] // 2 if up is None else gate.shape[-1]
    y = torch.empty((*gate.shape[:-1], width), dtype=gate.dtype, device=gate.device)
    if y.numel() == 0:
        return y
    g, u = _halves(gate, up)
    N, C = g.shape
    meta = tile_meta(C)
    with on_device(gate):
        grid = (triton.cdiv(N, meta["ROWS"]), triton.cdiv(C, meta["BLOCK"]))
        swiglu_fwd_kernel[grid](g, u, y, g.stride(0), u.stride(0), N, C, ACT=activation, **meta)
    return y


def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor | None, activation: int) -> tuple[Tensor, Tensor | None]:
    """Return dgate, packed like gate, and dup (None for a packed gate)."""
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = None if up is None else torch.empty_like(dgate)
    if dgate.numel() == 0:
        return dgate, dup
    (g, u), (dg, du), d = _halves(gate, up), _halves(dgate, dup), as_rows(dy)
    N, C = g.shape
    meta = tile_meta(C)
    with on_device(gate):
        grid = (triton.cdiv(N, meta["ROWS"]), triton.cdiv(C, meta["BLOCK"]))
        strides = (d.stride(0), g.stride(0), u.stride(0), dg.stride(0))
        swiglu_bwd_kernel[grid](d, g, u, dg, du, *strides, N, C, ACT=activation, **meta)
    return dgate, dup


def configurations(dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Iterator[Configuration]:
    """Yield every launch shape of this file for every activation."""
    sizes = {"gate_row": "i32", "up_row": "i32", "N": "i32", "C": "i32"}
    grads = {"dy_row": "i32", "grad_row": "i32"}
    for act, name in enumerate(("silu", "gelu", "relu2", "gelu_tanh")):
        for block in powers_of_two(16, MAX_BLOCK):
            meta, warps = split_meta(tile_meta(block))
            quick = name != "relu2" and quick_width(block)
            types = pointers(gate_ptr=dtype, up_ptr=dtype, y_ptr=dtype)
            arguments = {**types, **sizes, "ACT": act}
            yield Configuration(swiglu_fwd_kernel, f"C={block} {name}", arguments, warps, meta, quick=quick)
            del types["y_ptr"]
            types |= pointers(dy_ptr=dtype, dgate_ptr=dtype, dup_ptr=dtype)
            types = {**types, **sizes, **grads}
            yield Configuration(swiglu_bwd_kernel, f"C={block} {name}", {**types, "ACT": act}, warps, meta, quick=quick)
