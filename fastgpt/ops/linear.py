"""Linear layer: kernels for generation and for training on a CPU, and a weight gradient that keeps its buffer.

    y = x (s W)^T + b;  dx = dy W,  dW = dy^T x,  db = sum over the rows of dy

W is in the dtype of x; or, for inference, x is fp32 and W bf16 or fp16, or W is int8 with one fp32 scale s for each
output (symmetric quantisation: W = round(w / s), s = max |w| / 127 of a row).

Where nothing needs a gradient, the CPU kernel computes up to MAX_ROWS rows, and with a narrower weight any number of
rows. It reads the weight once for 64 rows, in the layout of torch.nn.Linear, converts it in registers and sums in fp32.
In training, `use(linear="cpu")` lets a second kernel compute the three products of fp32 rows. `auto` leaves them to
PyTorch: a step was not measured as faster with the kernel (docs/benchmarks.md). Its threads take parts of the output
one by one, so a core that other work slows down gets fewer of them. Other products are PyTorch's; the `torch` backend
converts a narrower weight a block at a time.

If the weight has a `grad_buffer`, the matrix product of the backward writes dW there: the first backward of a step
overwrites the buffer, later ones add to it (gradient accumulation fusion, as in Megatron-LM). For each weight and step
this saves a new tensor (on a CPU its page faults cost as much as the product at small batches) and, with accumulation,
one read and two writes.

Saved for backward: x and W, as in torch.nn.functional.linear.

Determinism: the kernels' results depend neither on the number of threads nor on the other rows. Other products have the
determinism of torch.mm.

Limits: the kernels are not used under torch.compile, torch.func, forward-mode AD or autocast, which get
torch.nn.functional.linear, nor for second derivatives, which are PyTorch's products. With a `grad_buffer`, first
derivatives only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastgpt.core.backend import Cell, chosen, register, select
from fastgpt.core.device import in_huge_pages
from fastgpt.ops._common import check_float, check_like, define, flop_formula, gradient_place, needs_grad, no_outputs

MAX_ROWS = 64  # beyond them the kernel would read the weight again, and the library's product is tuned to the CPU
BLOCK_NUMEL = 2**20  # of a narrower weight, converted at a time by the `torch` backend
LEAST_ROWS = 32  # below them a product takes as long as reading its weight
LEAST_WORK = 2**23  # multiplications of a product: fewer take less time than an autograd function in Python
PLAIN = (Tensor, nn.Parameter)  # a subclass has its own F.linear


def _fwd_fake(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


LINEAR_FWD = define(
    "linear", "linear_fwd", "(Tensor x, Tensor weight, Tensor? scale, Tensor? bias) -> Tensor", _fwd_fake
)
LINEAR_PRODUCT = define(
    "linear", "linear_product", "(Tensor a, Tensor b, Tensor? bias, Tensor(a!) out, bool add) -> ()", no_outputs
)
flop_formula("linear_product", lambda a, b, *args, **kwargs: 2 * a[0] * a[1] * b[1])
flop_formula("linear_fwd", lambda x, weight, *args, **kwargs: 2 * torch.Size(x).numel() * weight[0])
register("linear", cpu=Cell())


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, scale: Tensor | None = None) -> Tensor:
    """Compute the formula at the head of this file, in fp32 (fp64 for fp64 input). The parity tests take it as the
    truth."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight.to(wide).t()
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias).to(x.dtype)


def linear_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, scale: Tensor | None = None) -> Tensor:
    """Serve the `torch` backend and the parity baseline: PyTorch's product, of a narrower weight block by block."""
    if scale is None and weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, n_out = x.reshape(-1, x.shape[-1]).to(wide), weight.shape[0]
    y = rows.new_empty(rows.shape[0], n_out)
    step = max(1, BLOCK_NUMEL // max(1, weight.shape[1]))
    for first in range(0, n_out, step):
        block = weight[first : first + step].to(wide)
        torch.mm(rows, block.t(), out=y[:, first : first + step])
    if scale is not None:
        y *= scale
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], n_out)


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None, add: bool = False) -> Tensor:
    """Return a b + bias (N, F) for a (N, C) and b (C, F), in `out` if given: instead of what it holds, or added to it.

    Autograd does not see it. It is the kernel's if `use` has chosen it, else PyTorch's product.
    """
    assert not add or (out is not None and bias is None), "a sum needs its place"
    plain = b.dtype == a.dtype and (out is None or (out.dtype == a.dtype and out.stride(1) == 1))
    backend = _multiplier(a, a.shape[0], a.shape[1], b.shape[1]) if plain else "torch"
    out = in_huge_pages(a.new_empty((a.shape[0], b.shape[1]))) if out is None else out
    if backend != "torch":
        LINEAR_PRODUCT[backend](a, b, bias, out, add)
        return out
    if add:
        return torch.addmm(out, a, b, out=out)  # PyTorch's FLOP counter does not count addmm_
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def _multiplier(x: Tensor, n: int, c: int, f: int) -> str:
    """Return the backend that computes the product of x (N, C) with (C, F) in training."""
    if chosen("linear") != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return "torch"
    return select("linear", x) if min(n, f) >= LEAST_ROWS and n * c * f >= LEAST_WORK else "torch"


def weight_gradient(weight: Tensor, x: Tensor, *grads: Tensor) -> Tensor | None:
    """Return dy^T x (F, C) for rows x (N, C) and dy (N, F), or None if it was written to the buffer of the weight.

    grads: dy, or the parts of its columns in order.
    """
    place, holds_sum = gradient_place(weight)
    sizes = [dy.shape[1] for dy in grads]
    out = in_huge_pages(x.new_empty((sum(sizes), x.shape[1]))) if place is None else place
    for part, dy in zip(out.split(sizes), grads, strict=True):
        product(dy.t(), x, out=part, add=holds_sum)
    if place is None:
        return out
    weight.grad = place
    return None


class LinearFn(torch.autograd.Function):
    """Autograd of a linear layer over rows: (x, weight, bias) -> y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.has_bias, ctx.owner = bias is not None, weight  # saved-tensor hooks return a copy without the buffer
        ctx.save_for_backward(x, weight)
        return product(x.reshape(-1, x.shape[-1]), weight.t(), bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, x_rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        for_x, for_weight, for_bias = ctx.needs_input_grad
        dbias = rows.sum(0) if ctx.has_bias and for_bias else None
        if torch.is_grad_enabled():  # create_graph: of products that autograd knows
            if gradient_place(ctx.owner)[0] is not None:
                raise RuntimeError("linear: create_graph with a grad_buffer, expected first derivatives only")
            dx = (rows @ weight).view(x.shape) if for_x else None
            return dx, rows.t() @ x_rows if for_weight else None, dbias
        dx = product(rows, weight).view(x.shape) if for_x else None
        return dx, weight_gradient(ctx.owner, x_rows, rows) if for_weight else None, dbias


def _check_narrow(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> None:
    """Raise unless the arguments fit a weight that is narrower than x."""
    check_float("linear", "x", x)
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: weight has shape {tuple(weight.shape)}, expected (F, C) with x {tuple(x.shape)} as (..., C)"
        )
    if (scale is None) == (weight.dtype == torch.int8):
        found = "no scale" if scale is None else "a scale"
        raise TypeError(f"linear: weight is {weight.dtype} with {found}, expected torch.int8 with a scale or none")
    n = (weight.shape[0],)
    check_like("linear", "scale", scale, n, x, (torch.float32,), "as weight has rows")
    check_like("linear", "bias", bias, n, x, (x.dtype,), "as weight has rows")
    if needs_grad(x, weight, bias, scale):
        raise ValueError(
            f"linear: an input needs a gradient and weight is {weight.dtype}, expected torch.no_grad() or a weight in "
            f"{x.dtype}"
        )


def _narrow(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """Compute the product with a weight that is narrower than x."""
    _check_narrow(x, weight, bias, scale)
    if torch.compiler.is_compiling():
        return linear_ref(x, weight, bias, scale=scale)
    backend = select("linear", x) if _fits(x, weight, bias) else "torch"
    if backend == "torch":
        return linear_torch(x, weight, bias, scale=scale)
    return LINEAR_FWD[backend](x, weight, scale, bias)  # type: ignore[no-any-return]


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether the kernel supports this call."""
    if type(x) not in PLAIN or type(weight) not in PLAIN or not x.numel():
        return False
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:] or weight.device != x.device:
        return False
    fits = bias is None or (bias.dtype == x.dtype and bias.shape == weight.shape[:1] and bias.device == x.device)
    return fits and not torch._C._are_functorch_transforms_active()


def _trains(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether the kernel computes the products of this call and of its backward."""
    if chosen("linear") != "cpu" or weight.dtype != x.dtype or not _fits(x, weight, bias):
        return False
    if forward_ad._current_level >= 0:  # PyTorch's product has a forward-mode derivative, LinearFn has none
        return False
    c = x.shape[-1]
    return _multiplier(x, x.numel() // c, c, weight.shape[0]) != "torch"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, scale: Tensor | None = None) -> Tensor:
    """Compute torch.nn.functional.linear; the gradient of a weight with a `grad_buffer` (fastgpt.nn.keep_gradients) is
    written there.

    Args:
        x: (..., C).
        weight: (F, C), of x's dtype; for inference also bf16 or fp16 with fp32 x, or int8 with a scale.
        bias: (F,), of x's dtype, or None.
        scale: (F,) fp32, of an int8 weight.

    Returns:
        (..., F), of x's dtype.

    Raises:
        RuntimeError: as torch.nn.functional.linear, for shapes or dtypes that do not fit.
        ValueError, TypeError: the same, for a weight that is narrower than x; or something needs a gradient there.

    Example:
        >>> import torch
        >>> from fastgpt import nn, ops
        >>> layer = nn.Linear(64, 32)
        >>> nn.keep_gradients(layer, min_numel=1)
        >>> ops.linear(torch.randn(8, 64), layer.weight, layer.bias).sum().backward()
        >>> layer.weight.grad is layer.weight.grad_buffer
        True
    """
    if scale is not None:
        return _narrow(x, weight, bias, scale)
    if torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    if weight.dtype != x.dtype and x.dtype == torch.float32 and weight.dtype in (torch.bfloat16, torch.float16):
        return _narrow(x, weight, bias, None)
    if torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if needs_grad(x, weight, bias):
        kept = getattr(weight, "grad_buffer", None) is not None and weight.requires_grad
        if not kept and not _trains(x, weight, bias):
            return F.linear(x, weight, bias)
        y: Tensor = LinearFn.apply(x, weight, bias)
        return y
    few = x.dim() > 0 and x.numel() <= MAX_ROWS * x.shape[-1]
    if few and weight.dtype == x.dtype and _fits(x, weight, bias):
        backend = select("linear", x)
        if backend != "torch":
            return LINEAR_FWD[backend](x, weight, None, bias)  # type: ignore[no-any-return]
    return F.linear(x, weight, bias)
