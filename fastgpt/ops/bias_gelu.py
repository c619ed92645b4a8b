"""bias + GELU in one pass (Hendrycks, Gimpel 2016, arXiv:1606.08415).

    u = x + bias
    y = u Phi(u), Phi the normal distribution             (approximate="none")
    y = u / 2 (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3)))   (approximate="tanh", GPT-2)
    dx = dy y'(u),  dbias = sum_N(dx)

Forward reads x and writes y once. Backward reads dy and x and writes dx once; dbias is summed in fp32 in the same pass
and a small reduction.

Saved for backward: x and bias. u and y' are recomputed.

Determinism: bitwise. dbias is summed in a fixed order, without atomics.

Limits: the bias's dtype is x's or fp32. First derivatives only.
"""

from __future__ import annotations

import itertools
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.core.backend import Cell, register, select
from fastgpt.ops._common import check_float, check_like, contiguous_like, define, fp64_results, relative_error
from fastgpt.ops._pointwise import pointwise


def _fwd_fake(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _bwd_fake(dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor | None, ...]:
    return contiguous_like(x, bias)


BIAS_GELU_FWD = define("bias_gelu", "bias_gelu_fwd", "(Tensor x, Tensor? bias, bool tanh) -> Tensor", _fwd_fake)
BIAS_GELU_BWD = define(
    "bias_gelu",
    "bias_gelu_bwd",
    "(Tensor dy, Tensor x, Tensor? bias, bool tanh) -> (Tensor, Tensor?)",
    _bwd_fake,
)


def bias_gelu_ref(x: Tensor, bias: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    """Compute the formula at the head of this file, in fp32 (fp64 for fp64 input). The parity tests take it as the
    truth."""
    u = x.to(torch.promote_types(x.dtype, torch.float32))
    u = u if bias is None else u + bias
    if approximate == "tanh":
        return (0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))).to(x.dtype)
    return (0.5 * u * torch.erfc(-u / math.sqrt(2))).to(x.dtype)


def bias_gelu_torch(x: Tensor, bias: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    """Serve the `torch` backend and the parity baseline: eager, in two passes."""
    return F.gelu(x if bias is None else x + bias, approximate=approximate).to(x.dtype)


def _self_check(backend: str, device: torch.device) -> float:
    worst = 0.0
    kinds = [(torch.float32, 130)] + [(torch.bfloat16, 3072)] * (backend == "cuda")  # bf16: 16-byte accesses
    for approximate, (dtype, n_cols) in itertools.product(("none", "tanh"), kinds):
        x, dy = torch.randn(2, 5, n_cols, device=device).mul_(2).to(dtype).unbind()
        bias = torch.randn(n_cols, device=device).to(dtype)
        tanh = approximate == "tanh"
        got = [BIAS_GELU_FWD[backend](x, bias, tanh), *BIAS_GELU_BWD[backend](dy, x, bias, tanh)]
        exact = fp64_results(partial(bias_gelu_ref, approximate=approximate), (x, bias), (dy,))
        worst = max(worst, relative_error(got, exact))
    return worst


register("bias_gelu", _self_check, cuda=Cell(), triton=Cell(), cpu=Cell())


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    """Return gelu(x + bias).

    Args:
        x: (..., F), any strides; fp32, bf16, fp16 (fp64 on the reference).
        bias: (F,) in x's dtype or fp32, or None.
        approximate: "none" (erf) or "tanh" (GPT-2).

    Returns:
        (..., F) in x's dtype; the sum and the function are computed in fp32.

    Raises:
        ValueError, TypeError: with the argument, the value received and the value expected.

    Example:
        >>> import torch
        >>> from fastgpt import ops
        >>> y = ops.bias_gelu(torch.randn(8, 256), torch.zeros(256), approximate="tanh")
        >>> y.shape
        torch.Size([8, 256])

    Source: Hendrycks, Gimpel 2016 (arXiv:1606.08415).
    """
    check_float("bias_gelu", "x", x)
    if x.dim() == 0:
        raise ValueError("bias_gelu: x has shape (), expected (..., F)")
    dtypes = (x.dtype, torch.float32)
    check_like("bias_gelu", "bias", bias, (x.shape[-1],), x, dtypes, "to match x's last dimension")
    if approximate not in ("none", "tanh"):
        raise ValueError(f"bias_gelu: approximate is {approximate!r}, expected 'none' or 'tanh'")
    backend = select("bias_gelu", x)
    if backend == "torch":
        return bias_gelu_torch(x, bias, approximate=approximate)
    return pointwise(BIAS_GELU_FWD[backend], BIAS_GELU_BWD[backend], x, bias, approximate == "tanh")
