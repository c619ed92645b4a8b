"""MLP with GELU in the epilogues of its products (Hendrycks, Gimpel 2016, arXiv:1606.08415).

    u = x W1^T,  h = gelu(u + b1),  y = h W2^T + b2
    forward    the product of u writes u and h
    backward   du = (dy W2) gelu'(u + b1) from one product, which also sums db1;  dx = du W1
               dW1 = du^T x,  dW2 = dy^T h,  db1 = sum_N(du),  db2 = sum_N(dy)

W1 (F, C) and W2 (C, F) are in the layout of torch.nn.Linear. The kernels multiply and apply GELU, its slope and the sum
for db1 to a tile before it goes to memory. A call of `bias_gelu` between two linear layers reads u once more in
forward, and in backward writes and reads dy W2. PyTorch computes the other four products. One of 2 N C F FLOP.

Saved for backward: x, u, h and the parameters; without h if `recompute`.

Determinism: db1 is summed in a fixed order, without atomics. PyTorch's products have the determinism of torch.mm.

Limits: W1, W2 and b2 are in x's dtype, b1 in x's or fp32. First derivatives only. On the `torch` backend, as on a CPU,
the same layers run one by one: `linear`, `bias_gelu`, `linear`.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.core.backend import Cell, register, select
from fastgpt.ops._common import (
    autocast,
    check_float,
    check_like,
    contiguous_like,
    define,
    flop_formula,
    fp64_results,
    needs_grad,
    relative_error,
    rows_of,
)
from fastgpt.ops.bias_gelu import BIAS_GELU_FWD, bias_gelu, bias_gelu_ref
from fastgpt.ops.linear import linear, weight_gradient


def _fwd_fake(x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape)


def _bwd_fake(dy: Tensor, weight: Tensor, u: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor | None, ...]:
    return contiguous_like(u, bias)


GELU_MLP_FWD = define(
    "gelu_mlp", "gelu_mlp_fwd", "(Tensor x, Tensor weight, Tensor? bias, bool tanh) -> (Tensor, Tensor)", _fwd_fake
)
GELU_MLP_BWD = define(
    "gelu_mlp",
    "gelu_mlp_bwd",
    "(Tensor dy, Tensor weight, Tensor u, Tensor? bias, bool tanh) -> (Tensor, Tensor?)",
    _bwd_fake,
)


def _flop(rows: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * rows[0] * weight[0] * weight[1]


flop_formula("gelu_mlp_fwd", _flop)
flop_formula("gelu_mlp_bwd", _flop)


def gelu_mlp_ref(
    x: Tensor, up_weight: Tensor, up_bias: Tensor | None, down_weight: Tensor, down_bias: Tensor | None = None, *,
    approximate: str = "none", recompute: bool = False,
) -> Tensor:  # fmt: skip
    """Compute the formula at the head of this file, in fp32 (fp64 for fp64 input). The parity tests take it as the
    truth."""
    wide = torch.promote_types(x.dtype, torch.float32)
    u = x.to(wide) @ up_weight.to(wide).t()
    y = bias_gelu_ref(u, up_bias, approximate=approximate) @ down_weight.to(wide).t()
    return (y if down_bias is None else y + down_bias).to(x.dtype)


def gelu_mlp_torch(
    x: Tensor, up_weight: Tensor, up_bias: Tensor | None, down_weight: Tensor, down_bias: Tensor | None = None, *,
    approximate: str = "none", recompute: bool = False,
) -> Tensor:  # fmt: skip
    """Compute the parity baseline: PyTorch's operators one by one."""
    u = F.linear(x, up_weight)
    h = F.gelu(u if up_bias is None else u + up_bias, approximate=approximate).to(x.dtype)
    return F.linear(h, down_weight, down_bias)


class GeluMlpFn(torch.autograd.Function):
    """Autograd over the raw ops: (backend, x, W1, b1, W2, b2, tanh, recompute) -> y."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
        tanh: bool, recompute: bool,
    ) -> Tensor:  # fmt: skip
        ctx.backend, ctx.tanh = backend, tanh
        ctx.owners = up, down  # saved-tensor hooks return copies without the buffers
        u, h = GELU_MLP_FWD[backend](rows_of(x), up, up_bias, tanh)
        ctx.save_for_backward(x, u, None if recompute else h, up, up_bias, down)
        return F.linear(h, down, down_bias).view(*x.shape[:-1], down.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u, h, up, up_bias, down = ctx.saved_tensors
        _, of_x, of_up, of_up_bias, of_down, of_down_bias, *_ = ctx.needs_input_grad
        dy = rows_of(dy)
        dx = d_up = d_up_bias = d_down = None
        if of_down:
            h = BIAS_GELU_FWD[ctx.backend](u, up_bias, ctx.tanh) if h is None else h
            d_down = weight_gradient(ctx.owners[1], h, dy)
        d_down_bias = dy.sum(0) if of_down_bias else None
        if of_x or of_up or of_up_bias:
            du, d_up_bias = GELU_MLP_BWD[ctx.backend](dy, down, u, up_bias, ctx.tanh)
            dx = (du @ up).view(x.shape) if of_x else None
            d_up = weight_gradient(ctx.owners[0], rows_of(x), du) if of_up else None
        return None, dx, d_up, d_up_bias if of_up_bias else None, d_down, d_down_bias, None, None


def _self_check(backend: str, device: torch.device) -> float:
    """Compare tiles that are cut off at every edge in fp32 and, on a GPU, whole ones of the tensor cores in bf16."""
    worst = 0.0
    kinds = [(torch.float32, (70, 20, 70))] + [(torch.bfloat16, (150, 128, 272))] * (device.type == "cuda")
    for approximate, (dtype, (n, c, f)) in itertools.product(("none", "tanh"), kinds):
        x, dy = torch.randn(2, n, c, device=device).to(dtype).unbind()
        up, down = torch.randn(2, f * c, device=device).div_(c**0.5).to(dtype).unbind()
        up, down, bias = up.view(f, c), down.view(c, f), torch.randn(f, device=device).to(dtype)
        tanh = approximate == "tanh"
        u, h = GELU_MLP_FWD[backend](x, up, bias, tanh)
        du, dbias = GELU_MLP_BWD[backend](dy, down, u, bias, tanh)
        gelu = partial(bias_gelu_ref, approximate=approximate)
        exact = fp64_results(gelu, (u, bias), (dy.double() @ down.double(),))
        worst = max(worst, relative_error([u, h, du, dbias], [x.double() @ up.double().t(), *exact]))
    return worst


register("gelu_mlp", _self_check, triton=Cell())


def _check(x: Tensor, up_weight: Tensor, up_bias: Tensor | None, down_weight: Tensor, down_bias: Tensor | None) -> None:
    op = "gelu_mlp"
    if up_weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != up_weight.shape[1]:
        shapes = f"up_weight has shape {tuple(up_weight.shape)}, expected (F, C)"
        raise ValueError(f"{op}: {shapes} with x {tuple(x.shape)} as (..., C)")
    if down_weight.dim() != 2 or down_weight.shape[1] != up_weight.shape[0]:
        shapes = f"down_weight has shape {tuple(down_weight.shape)}, expected (D, F)"
        raise ValueError(f"{op}: {shapes} with up_weight {tuple(up_weight.shape)} as (F, C)")
    same, features = (x.dtype,), (up_weight.shape[0],)
    check_like(op, "up_weight", up_weight, tuple(up_weight.shape), x, same, "")
    check_like(op, "down_weight", down_weight, tuple(down_weight.shape), x, same, "")
    check_like(op, "up_bias", up_bias, features, x, (x.dtype, torch.float32), "to match up_weight's rows")
    check_like(op, "down_bias", down_bias, (down_weight.shape[0],), x, same, "to match down_weight's rows")


def gelu_mlp(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None = None,
    *,
    approximate: str = "none",
    recompute: bool = False,
) -> Tensor:
    """Return linear(gelu(linear(x, up_weight, up_bias)), down_weight, down_bias).

    The gradient of a weight with a `grad_buffer` (fastgpt.nn.keep_gradients) is written there. Under autocast x and
    the weights are cast to its dtype.

    Args:
        x: (..., C) fp32, bf16, fp16 (fp64 on the reference).
        up_weight: (F, C) in x's dtype.
        up_bias: (F,) in x's dtype or fp32, or None.
        down_weight: (D, F) in x's dtype; D is C in a transformer.
        down_bias: (D,) in x's dtype, or None.
        approximate: "none" (erf) or "tanh" (GPT-2).
        recompute: save no gelu(...) for backward, which computes it again from the product before it.

    Returns:
        (..., D) in x's dtype.

    Raises:
        ValueError, TypeError: with the argument, the value received and the value expected.

    Example:
        >>> import torch
        >>> from fastgpt import ops
        >>> up, down = torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)
        >>> y = ops.gelu_mlp(torch.randn(8, 64), up.weight, up.bias, down.weight, down.bias, approximate="tanh")
        >>> y.shape
        torch.Size([8, 64])

    Source: Hendrycks, Gimpel 2016 (arXiv:1606.08415).
    """
    for name, t in (("x", x), ("up_weight", up_weight), ("down_weight", down_weight)):
        check_float("gelu_mlp", name, t)
    x, up_weight, down_weight, down_bias = autocast(x, up_weight, down_weight, down_bias)  # type: ignore[assignment]
    _check(x, up_weight, up_bias, down_weight, down_bias)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu_mlp: approximate is {approximate!r}, expected 'none' or 'tanh'")
    backend = select("gelu_mlp", x)
    if backend == "torch":
        h = bias_gelu(linear(x, up_weight), up_bias, approximate=approximate)
        return linear(h, down_weight, down_bias)
    tanh = approximate == "tanh"
    if needs_grad(x, up_weight, up_bias, down_weight, down_bias):
        y: Tensor = GeluMlpFn.apply(backend, x, up_weight, up_bias, down_weight, down_bias, tanh, recompute)
        return y
    _, h = GELU_MLP_FWD[backend](rows_of(x), up_weight, up_bias, tanh)
    return F.linear(h, down_weight, down_bias).view(*x.shape[:-1], down_weight.shape[0])
