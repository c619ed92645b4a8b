"""Gated activation in one pass (Shazeer 2020, arXiv:2002.05202; squared ReLU: So et al. 2021, arXiv:2109.08668).

    y = act(gate) * up,   act: silu(g) = g sigmoid(g), gelu(g) = g Phi(g), relu(g)^2 or
                           gelu_tanh(g) = g sigmoid(2 sqrt(2 / pi) (g + 0.044715 g^3))
    dgate = dy up act'(gate),  dup = dy act(gate)

Forward reads gate and up once and writes y once. Backward reads dy, gate and up once and writes both gradients once, as
one packed tensor for a packed input.

Saved for backward: gate and up. act and act' are recomputed.

Determinism: bitwise. Each element is computed independently.

Limits: gate and up share one dtype and shape. First derivatives only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.core.backend import Cell, register, select
from fastgpt.ops._common import check_float, check_like, contiguous_like, define, fp64_results, relative_error
from fastgpt.ops._pointwise import pointwise

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # the raw ops identify them by position
    "silu": F.silu,
    "gelu": F.gelu,
    "relu2": lambda x: F.relu(x).square(),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
NUMBERS = {name: i for i, name in enumerate(ACTIVATIONS)}
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda g: g * torch.sigmoid(g),
    "gelu": lambda g: 0.5 * g * torch.erfc(-g / math.sqrt(2)),
    "relu2": lambda g: torch.where(g > 0, g, 0.0) ** 2,
    "gelu_tanh": lambda g: g * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)),
}


def _fwd_fake(gate: Tensor, up: Tensor | None, activation: int) -> Tensor:
    width = gate.shape[-1] // 2 if up is None else gate.shape[-1]
    return gate.new_empty((*gate.shape[:-1], width))


def _bwd_fake(dy: Tensor, gate: Tensor, up: Tensor | None, activation: int) -> tuple[Tensor | None, ...]:
    return contiguous_like(gate, up)


SWIGLU_FWD = define("swiglu", "swiglu_fwd", "(Tensor gate, Tensor? up, int activation) -> Tensor", _fwd_fake)
SWIGLU_BWD = define(
    "swiglu",
    "swiglu_bwd",
    "(Tensor dy, Tensor gate, Tensor? up, int activation) -> (Tensor, Tensor?)",
    _bwd_fake,
)


def swiglu_ref(gate: Tensor, up: Tensor | None = None, *, activation: str = "silu") -> Tensor:
    """Compute the formula at the head of this file, in fp32 (fp64 for fp64 input). The parity tests take it as the
    truth."""
    g, u = gate.chunk(2, dim=-1) if up is None else (gate, up)
    wide = torch.promote_types(g.dtype, torch.float32)
    return (FORMULAS[activation](g.to(wide)) * u.to(wide)).to(g.dtype)


def swiglu_torch(gate: Tensor, up: Tensor | None = None, *, activation: str = "silu") -> Tensor:
    """Serve the `torch` backend and the parity baseline: eager, in two or more passes."""
    g, u = gate.chunk(2, dim=-1) if up is None else (gate, up)
    return ACTIVATIONS[activation](g) * u


def _self_check(backend: str, device: torch.device) -> float:
    worst = 0.0
    kinds = [(torch.float32, 130)] + [(torch.bfloat16, 2048)] * (backend == "cuda")  # bf16: 16-byte accesses
    for (name, number), (dtype, n_cols) in itertools.product(NUMBERS.items(), kinds):
        gate, up, dy = torch.randn(3, 5, n_cols, device=device).to(dtype).unbind()
        packed = torch.cat((gate, up), -1)
        got = [SWIGLU_FWD[backend](gate, up, number), *SWIGLU_BWD[backend](dy, gate, up, number)]
        got += [SWIGLU_FWD[backend](packed, None, number), SWIGLU_BWD[backend](dy, packed, None, number)[0]]
        y, *grads = fp64_results(partial(swiglu_ref, activation=name), (gate, up), (dy,))
        worst = max(worst, relative_error(got, [y, *grads, y, torch.cat(grads, -1)]))
    return worst


register("swiglu", _self_check, cuda=Cell(), triton=Cell(), cpu=Cell())


def swiglu(gate: Tensor, up: Tensor | None = None, *, activation: str = "silu") -> Tensor:
    """Return act(gate) * up.

    Args:
        gate: (..., F), or packed (..., 2F) with the gate first when up is None. Any strides; fp32, bf16, fp16 (fp64 on
            the reference).
        up: (..., F) in gate's dtype, or None.
        activation: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GeGLU; Gemma uses the second), "relu2" (squared ReLU).

    Returns:
        (..., F) in gate's dtype; the function and the product are computed in fp32.

    Raises:
        ValueError, TypeError: with the argument, the value received and the value expected.

    Example:
        >>> import torch
        >>> from fastgpt import ops
        >>> gate_up = torch.randn(8, 2 * 64, requires_grad=True)
        >>> y = ops.swiglu(gate_up)
        >>> y.sum().backward()
        >>> y.shape, gate_up.grad.shape
        (torch.Size([8, 64]), torch.Size([8, 128]))

    Source: Shazeer 2020 (arXiv:2002.05202).
    """
    check_float("swiglu", "gate", gate)
    if gate.dim() == 0:
        raise ValueError("swiglu: gate has shape (), expected (..., F) or packed (..., 2F)")
    if activation not in ACTIVATIONS:
        raise ValueError(f"swiglu: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if up is None and gate.shape[-1] % 2:
        raise ValueError(f"swiglu: packed gate has {gate.shape[-1]} columns, expected an even number (gate, then up)")
    check_like("swiglu", "up", up, tuple(gate.shape), gate, (gate.dtype,), "as gate")
    backend = select("swiglu", gate)
    if backend == "torch":
        return swiglu_torch(gate, up, activation=activation)
    return pointwise(SWIGLU_FWD[backend], SWIGLU_BWD[backend], gate, up, NUMBERS[activation])
