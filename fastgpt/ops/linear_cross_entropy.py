"""LM head and loss in one op, which holds only part of the logits in memory if they are large.

    z = x W^T + b      (N, V), then the loss of fastgpt/ops/cross_entropy.py over z, with all its options
    dx = dz W,   dW = dz^T x,   db = sum over the rows of dz

In one piece (the N V logits fit the budget): z is computed once and replaced by dz in one pass; backward is two
products. dz is kept without the upstream gradient, which scales the rows of dx and of a copy of x (N C elements each,
not N V), so backward may run again, and the gradient of a weight may be written or added to its `grad_buffer`. The
trainer announces the upstream gradient before the forward; dz then contains it, and nothing is copied or scaled.

In chunks: one buffer of (chunk, V) logits is reused. For "mean" and "sum", forward also computes the gradients, dW in
fp32 over all chunks for every dtype, and backward multiplies them by the upstream gradient. For "none", forward
computes the loss only; backward recomputes z chunk by chunk and scales the rows by the upstream gradients. There dW of
the chunks is added up in the weight's `grad_buffer`, if that is fp32. Nothing is filtered or approximated.

fp16 has five bits of exponent, so dz leaves out 1/count and the largest upstream gradient; both are applied to fp32
products.

The products are torch.mm, 2 N V C FLOP each: three of them, four for "none" in chunks. Method: chunks and gradients in
forward, Hsu et al. 2024 (arXiv:2410.10989).

Saved for backward: in one piece dz, x, W; in chunks dx and dW (fp32), for "none" x and W.

Determinism: bitwise wherever torch.mm is. The losses of the rows are summed in fp64 in a fixed order.

Limits: integer targets and (N, C) rows only. First derivatives only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.core.backend import Cell, register, select
from fastgpt.core.device import in_huge_pages
from fastgpt.ops._common import autocast, check_float, check_like, gradient_place, needs_grad, relative_error
from fastgpt.ops._linear_cross_entropy import (
    LINEAR_CROSS_ENTROPY_FWD,
    LINEAR_CROSS_ENTROPY_FWD_BWD,
    logits_budget,
    logits_of,
    loss_and_gradients,
    product_in_fp32,
)
from fastgpt.ops._upstream import expected_like, not_folded
from fastgpt.ops.cross_entropy import (
    CROSS_ENTROPY_FWD,
    CROSS_ENTROPY_FWD_BWD,
    SCALE_ROWS,
    Options,
    check_loss,
    check_values,
    cross_entropy_ref,
    cross_entropy_torch,
    denominator,
    reduce_rows,
    widened,
)
from fastgpt.ops.cross_entropy import _self_check as check_cross_entropy
from fastgpt.ops.linear import product, weight_gradient


def linear_cross_entropy_ref(
    x: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None, **options: Any
) -> Tensor:
    """Compute the formula at the head of this file, in fp32 (fp64 for fp64 input). The parity tests take it as the
    truth."""
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.to(wide) @ linear_weight.to(wide).t()
    return cross_entropy_ref(z if linear_bias is None else z + linear_bias.to(wide), target, **options)


def linear_cross_entropy_torch(
    x: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """Serve the `torch` backend and the parity baseline: PyTorch's linear layer, then its loss over fp32 logits."""
    return cross_entropy_torch(F.linear(x, linear_weight, linear_bias), target, options)


def _inner_scale(x: Tensor, count: Tensor | None, expected: Tensor | None) -> Tensor:
    """Return the part of the loss scale that dz contains, (1,) fp32: expected / count, or 1 in fp16 (head of this
    file)."""
    if count is None or x.dtype == torch.float16:
        return torch.ones(1, dtype=torch.float32, device=x.device) if expected is None else expected
    return count.reciprocal() if expected is None else expected / count


def _outer_scale(grad: Tensor, count: Tensor | None, expected: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the part of the loss scale that dz does not contain, fp32: (1,), or (N,) for "none"; None for 1."""
    rows = not_folded(grad, expected)
    if rows is None or count is None or dtype != torch.float16:
        return rows
    return torch.where(count > 0, rows / count, 0.0)


def _in_range(scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Split scale into a factor for 16-bit values and a factor for their fp32 products.

    In fp16 the second factor is the largest element of scale, so the first is at most 1. In other dtypes it is None.
    """
    if scale is None or dtype != torch.float16 or not scale.numel():
        return scale, None
    top = scale.abs().amax().reshape(1)
    return scale / torch.where(top > 0, top, 1.0), top


def _scaled(backend: str, t: Tensor, scale: Tensor | None) -> Tensor:
    """Return a copy of t (N, C) with each row multiplied by its scale and rounded once; with scale 1 a plain copy."""
    t = t.clone(memory_format=torch.contiguous_format)
    if scale is not None:
        SCALE_ROWS[backend](t, scale)
    return t


def _product(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scale * grad in dtype, without an fp32 product (V C elements) in memory."""
    return torch.mul(grad, scale, out=in_huge_pages(torch.empty_like(grad, dtype=dtype)))


def _deliver(weight: Tensor, grad: Tensor, scale: Tensor | None) -> Tensor | None:
    """Make scale * grad (fp32) the gradient of `weight` in one pass: return it, or write it to the buffer."""
    place, filled = gradient_place(weight)
    if place is None:
        return grad.to(weight.dtype) if scale is None else _product(grad, scale, weight.dtype)
    if scale is None:
        place.add_(grad) if filled else place.copy_(grad)
    else:
        torch.addcmul(place, grad, scale, out=place) if filled else torch.mul(grad, scale, out=place)
    weight.grad = place
    return None


def _weight_gradient(w: Tensor, dz: Tensor, x: Tensor, scale: Tensor | None) -> Tensor | None:
    """Return dz^T x, times scale (1,) if given. Without a scale, the product writes directly to a buffer if the buffer
    has the dtype of the weight."""
    place, _ = gradient_place(w)
    if scale is None and (place is None or place.dtype == w.dtype):
        return weight_gradient(w, x, dz)
    return _deliver(w, product_in_fp32(dz, x), scale)


def _bias_gradient(dz: Tensor, scale: Tensor | None) -> Tensor:
    """Return the sum of scale[row] * dz[row] in fp32."""
    if scale is None:
        return dz.sum(0, dtype=torch.float32)
    if scale.numel() == 1:
        return dz.sum(0, dtype=torch.float32) * scale
    return product_in_fp32(dz, scale[:, None].to(dz.dtype))[:, 0]


class LinearCrossEntropyFn(torch.autograd.Function):
    """Autograd in one piece: forward replaces the logits with dz, backward computes the products."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, weight: Tensor | None,
        reduction: str, options: Options,
    ) -> Tensor:  # fmt: skip
        dz = logits_of(x, w, b)
        loss = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        count = denominator(target, weight, options[0]) if reduction == "mean" else None
        expected = None if reduction == "none" else expected_like(x)
        CROSS_ENTROPY_FWD_BWD[backend](dz, loss, target, weight, _inner_scale(x, count, expected), *options)
        ctx.backend = backend
        ctx.save_for_backward(dz, x, w, b, count, expected)
        return reduce_rows(loss, reduction, count)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dz, x, w, b, count, expected = ctx.saved_tensors
        scale = _outer_scale(grad, count, expected, x.dtype)
        dx = dw = db = None
        if ctx.needs_input_grad[1]:
            dx = product(dz, w)
            if scale is not None:
                SCALE_ROWS[ctx.backend](dx, scale)
        scale, top = _in_range(scale, x.dtype)
        if ctx.needs_input_grad[2]:
            dw = _weight_gradient(w, dz, x if scale is None else _scaled(ctx.backend, x, scale), top)
        if ctx.needs_input_grad[3]:
            db = _deliver(b, _bias_gradient(dz, scale), top)
        return None, dx, dw, db, None, None, None, None


class ChunkedLinearCrossEntropyFn(torch.autograd.Function):
    """Autograd in chunks, "mean" or "sum": forward computes the gradients, backward multiplies them by the upstream
    gradient."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, weight: Tensor | None,
        reduction: str, options: Options, chunk: int, wanted: tuple[bool, bool, bool],
    ) -> Tensor:  # fmt: skip
        count = denominator(target, weight, options[0]) if reduction == "mean" else None
        expected = expected_like(x)
        scale = _inner_scale(x, count, expected)
        raw = LINEAR_CROSS_ENTROPY_FWD_BWD[backend]
        loss, dx, dw, db = raw(x, w, b, target, weight, scale, *options, chunk, wanted)
        ctx.backend, ctx.dtype = backend, x.dtype
        ctx.save_for_backward(dx, dw, db, w, b, count, expected)
        return reduce_rows(loss, reduction, count)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, db, w, b, count, expected = ctx.saved_tensors
        scale = _outer_scale(grad, count, expected, ctx.dtype)
        dx = None if dx is None else _scaled(ctx.backend, dx, scale)
        dw = None if dw is None else _deliver(w, dw, scale)
        db = None if db is None else _deliver(b, db, scale)
        return None, dx, dw, db, None, None, None, None, None, None


class RecomputedLinearCrossEntropyFn(torch.autograd.Function):
    """Autograd in chunks, "none": forward computes the loss, backward recomputes the logits for the gradients."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, weight: Tensor | None,
        options: Options, chunk: int,
    ) -> Tensor:  # fmt: skip
        ctx.backend, ctx.options, ctx.chunk = backend, options, chunk
        ctx.save_for_backward(x, w, b, target, weight)
        return LINEAR_CROSS_ENTROPY_FWD[backend](x, w, b, target, weight, *options, chunk)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b, target, weight = ctx.saved_tensors
        wanted, (scale, top) = ctx.needs_input_grad[1:4], _in_range(_outer_scale(grad, None, None, x.dtype), x.dtype)
        arguments = (x, w, b, target, weight, scale, *ctx.options, ctx.chunk, wanted)
        place, filled = gradient_place(w) if wanted[1] and top is None else (None, False)
        if place is not None and place.dtype == torch.float32:  # no tensor of the size of dW
            _, dx, w.grad, db = loss_and_gradients(ctx.backend, *arguments, place=place, filled=filled)
            return None, dx, None, None if db is None else _deliver(b, db, None), None, None, None, None, None
        _, dx, dw, db = LINEAR_CROSS_ENTROPY_FWD_BWD[ctx.backend](*arguments)
        dx = dx if dx is None or top is None else _scaled(ctx.backend, dx, top)
        dw = None if dw is None else _deliver(w, dw, top)
        db = None if db is None else _deliver(b, db, top)
        return None, dx, dw, db, None, None, None, None, None


def rows_at_once(n: int, v: int, itemsize: int, budget: int) -> int:
    """Return the rows of a chunk for chunk="auto".

    They are n if all logits take at most `budget` bytes, else those of the fewest chunks within the budget.

    Chunks have equal sizes, because a short last chunk costs as many passes over dW as a whole one. Their size is a
    multiple of 128 rows (the tile of a matrix product), and at least 128.
    """
    if n * v * itemsize <= budget:
        return n
    most = max(128, budget // (v * itemsize) // 128 * 128)
    pieces = -(-n // most)
    return -(-n // (pieces * 128)) * 128


def _loss(
    backend: str, x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, weight: Tensor | None, reduction: str,
    options: Options, chunk: int,
) -> Tensor:  # fmt: skip
    """Compute the loss on a kernel backend. What needs a gradient and whether there are chunks decide how."""
    whole = chunk >= x.shape[0]
    if needs_grad(x, w, b):
        if whole:
            return LinearCrossEntropyFn.apply(backend, x, w, b, target, weight, reduction, options)
        if reduction == "none":
            return RecomputedLinearCrossEntropyFn.apply(backend, x, w, b, target, weight, options, chunk)
        wanted = (x.requires_grad, w.requires_grad, b is not None and b.requires_grad)
        arguments = (backend, x, w, b, target, weight, reduction, options, chunk, wanted)
        return ChunkedLinearCrossEntropyFn.apply(*arguments)
    if whole:
        loss = CROSS_ENTROPY_FWD[backend](logits_of(x, w, b), target, weight, *options)[0]
    else:
        loss = LINEAR_CROSS_ENTROPY_FWD[backend](x, w, b, target, weight, *options, chunk)
    return reduce_rows(loss, reduction, denominator(target, weight, options[0]) if reduction == "mean" else None)


def _self_check(backend: str, device: torch.device) -> float:
    """Compare on values whose products are exact in TF32 and bf16 too, with logits 64 apart: the error is 0 if all is
    right."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-2, 3, s, generator=generator).to(device).double() for s in ((7, 8), (33, 8)))
    w, b, target = 64 * w, 64 * (x.new_tensor(range(33)) % 5), torch.tensor([0, 29, 7, -100, 5, 1, 2], device=device)
    options, worst = (-100, 0.0, 0.0, 0.0, 30), check_cross_entropy(backend, device)
    for reduction in ("none", "sum"):
        x, w, b = (t.detach().requires_grad_() for t in (x, w, b))
        exact = linear_cross_entropy_ref(x, w, target, linear_bias=b, vocab_size=30, reduction=reduction)
        wanted = [exact.detach(), *torch.autograd.grad(exact.sum(), (x, w, b))]
        for dtype, chunk in ((torch.float32, 7), (torch.float32, 3), (torch.bfloat16, 7), (torch.bfloat16, 3)):
            own = [t.detach().to(dtype).requires_grad_() for t in (x, w, b)]
            loss = _loss(backend, *own, target, None, reduction, options, chunk)  # type: ignore[call-arg, arg-type]
            worst = max(worst, relative_error([loss.detach(), *torch.autograd.grad(loss.sum(), own)], wanted))
    loss = LINEAR_CROSS_ENTROPY_FWD[backend](x.detach().float(), w.detach().float(), None, target, None, *options, 3)
    exact = linear_cross_entropy_ref(x, w, target, vocab_size=30, reduction="none")
    return max(worst, relative_error([loss], [exact.detach()]))


register("linear_cross_entropy", _self_check, cuda=Cell(), triton=Cell(), cpu=Cell())


def linear_cross_entropy(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    vocab_size: int | None = None,
    reduction: str = "mean",
    chunk: int | str = "auto",
) -> Tensor:
    """Compute the cross-entropy of the logits of a linear layer; the docstrings of the modules of this op and of
    `cross_entropy` have the formula and the sources.

    Args:
        x: (N, C) fp32, bf16, fp16 (fp64 on the reference). Under autocast, x, linear_weight and linear_bias are cast to
            its dtype.
        linear_weight: (V, C) in x's dtype. Rows from vocab_size on are padding (gradient 0).
        target: (N,) int64 in [0, vocab_size) or ignore_index.
        linear_bias: (V,) in x's dtype, or None.
        weight, ignore_index, label_smoothing, z_loss, softcap, vocab_size, reduction: as in `cross_entropy`.
        chunk: rows of logits in memory at a time. "auto": all of them while they take at most 1/16 of the GPU's memory
            (elsewhere 512 MiB), else the fewest equal pieces of a multiple of 128 rows within that. The reference
            computes all rows at once.

    Returns:
        The loss in fp32 (fp64 for fp64 input), (N,) for reduction "none", else 0-dim.

    Raises:
        ValueError, TypeError: with the argument, the value received and the value expected. On a CPU that includes
            targets out of range. On a GPU such a target gives a NaN loss and a zero gradient; with FASTGPT_CHECK=1 the
            call waits for the device and raises.

    Example:
        >>> import torch
        >>> from fastgpt import ops
        >>> x, head = torch.randn(64, 32, requires_grad=True), torch.randn(1000, 32, requires_grad=True)
        >>> loss = ops.linear_cross_entropy(x, head, torch.randint(1000, (64,)), chunk=16)
        >>> loss.backward()
        >>> head.grad.shape
        torch.Size([1000, 32])
    """
    op = "linear_cross_entropy"
    check_float(op, "x", x)
    check_float(op, "linear_weight", linear_weight)
    if x.dim() != 2 or linear_weight.dim() != 2 or x.shape[1] != linear_weight.shape[1]:
        shapes = f"x {tuple(x.shape)} and linear_weight {tuple(linear_weight.shape)}"
        raise ValueError(f"{op}: {shapes}, expected (N, C) and (V, C)")
    cast = autocast(x, linear_weight, linear_bias)
    x, linear_weight, linear_bias = cast[0], cast[1], cast[2]  # type: ignore[assignment]
    (n, c), v = x.shape, linear_weight.shape[0]
    check_like(op, "linear_weight", linear_weight, (v, c), x, (x.dtype,), "to match x")
    check_like(op, "linear_bias", linear_bias, (v,), x, (x.dtype,), "to match linear_weight's rows")
    if chunk != "auto" and not (isinstance(chunk, int) and chunk >= 1):
        raise ValueError(f"{op}: chunk is {chunk!r}, expected 'auto' or a number of rows")
    k, sides = v if vocab_size is None else vocab_size, ("x's rows", "the rows of linear_weight")
    check_loss(op, (n, v), sides, x, target, weight, label_smoothing, k, reduction)
    check_values(op, target, ignore_index, k)
    weight = widened(weight, x)
    backend = select(op, x)
    if backend == "torch":
        options: dict[str, Any] = dict(weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing)
        options |= dict(z_loss=z_loss, softcap=softcap, vocab_size=vocab_size, reduction=reduction)
        return linear_cross_entropy_torch(x, linear_weight, target, linear_bias, options)
    packed = (ignore_index, float(label_smoothing), float(z_loss), float(softcap), k)
    rows = rows_at_once(n, v, x.element_size(), logits_budget(x.device)) if isinstance(chunk, str) else chunk
    return _loss(backend, x, linear_weight, linear_bias, target, weight, reduction, packed, rows)
