"""Divergence between the distributions of two linear heads, a student's and a teacher's, without whole logits.

    z = x W^T + b   (student),   z_t = x_t W_t^T + b_t   (teacher),   each (N, V)
    forward_kl   sum p (log p - log q)          with p = softmax(z_t / t), q = softmax(z / t)
    reverse_kl   sum q (log q - log p)
    jsd          beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q

Method: generalised JSD, Agarwal et al. 2024 (GKD, arXiv:2306.13649). jsd tends to 0 as beta tends to 0 or 1, and
jsd / beta tends to forward_kl as beta tends to 0, jsd / (1 - beta) to reverse_kl as beta tends to 1. TRL's
generalized_jsd_loss returns these two KL for beta 0 and 1, without that factor.

Two buffers of (chunk, V) logits are reused. For "mean" and "sum" forward also computes the gradients, dW in fp32 over
all chunks, and backward multiplies them by the upstream gradient; for "none" backward recomputes the logits. The
teacher gets no gradient. The hidden widths of the two may differ. A row takes 2 V (C + C_t) FLOP forward, 4 V C more
for the gradients.

Saved for backward: dx and dW (fp32); for "none" the arguments.

Determinism: bitwise wherever torch.mm is. The losses of the rows are summed in fp64 in a fixed order.

Limits: on kernels the teacher's logits are rounded to the student's dtype. First derivatives only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastgpt.core.backend import Cell, register, select
from fastgpt.ops._common import autocast, check_float, check_like, needs_grad, relative_error
from fastgpt.ops._linear_cross_entropy import Gradients, logits_budget
from fastgpt.ops._linear_divergence import LINEAR_DIVERGENCE_FWD, run
from fastgpt.ops.divergence import KINDS, LINEAR_DIVERGENCE_ROWS, divergence_ref

Head = tuple[Tensor, Tensor, Tensor | None]  # x (N, C), weight (V, C), bias (V,)


def linear_divergence_ref(
    x: Tensor, linear_weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor, target: Tensor | None = None, *,
    linear_bias: Tensor | None = None, teacher_bias: Tensor | None = None, kind: str = "forward_kl", beta: float = 0.5,
    temperature: float = 1.0, vocab_size: int | None = None, ignore_index: int = -100, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Compute the formula at the head of this file with whole logits, in fp32 (fp64 for fp64 input)."""
    k = linear_weight.shape[0] if vocab_size is None else vocab_size
    logits = []
    for t, w, b in ((x, linear_weight, linear_bias), (teacher_x, teacher_weight, teacher_bias)):
        wide = torch.promote_types(t.dtype, torch.float32)
        z = t.to(wide) @ w[:k].to(wide).t()
        logits.append(z if b is None else z + b[:k].to(wide))
    loss = divergence_ref(logits[0], logits[1].detach(), kind, beta, temperature)
    count = torch.tensor(float(len(loss))) if target is None else (target != ignore_index).sum()
    loss = loss if target is None else torch.where(target == ignore_index, 0.0, loss)
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.sum() / count


Settings = tuple[int, float, float, int, int, int]  # kind, beta, temperature, ignore_index, vocab_size, rows of a chunk


def _reduced(loss: Tensor, reduction: str, count: Tensor | None) -> Tensor:
    """Return the losses, their sum, or the sum divided by `count`. The sum is fp64, so it is rounded once."""
    if reduction == "none":
        return loss
    total = loss.sum(dtype=torch.float64)
    return (total if count is None else total / count[0]).to(loss.dtype)


def _run(backend: str, *arguments: Any) -> Gradients:
    """Return the loss and the gradients: from one opaque op, or from PyTorch's ops on the `torch` backend."""
    results: Gradients = run("torch", *arguments) if backend == "torch" else LINEAR_DIVERGENCE_FWD[backend](*arguments)
    return results


def _split(scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Split scale into the part for dz and the part for the fp32 gradients, because 1 / count can be 0 in fp16."""
    if dtype != torch.float16 or not scale.numel():
        return scale, None
    top = scale.abs().amax().clamp(min=1e-30).reshape(1)
    return scale / top, top


def _times(grad: Tensor | None, factor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return factor * grad in dtype, without an fp32 copy of grad."""
    if grad is None or factor is None:
        return None if grad is None else grad.to(dtype)
    return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))


class LinearDivergenceFn(torch.autograd.Function):
    """Autograd for "mean" and "sum": forward computes the gradients, backward multiplies them by the upstream one."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, x: Tensor, w: Tensor, b: Tensor | None, x_t: Tensor, w_t: Tensor, b_t: Tensor | None,
        target: Tensor | None, count: Tensor | None, settings: Settings, wanted: tuple[bool, bool, bool],
    ) -> Tensor:  # fmt: skip
        scale = x.new_ones(1, dtype=_wide(x)) if count is None else count.clamp(min=1).to(_wide(x)).reciprocal()
        inner, outer = _split(scale, x.dtype)
        loss, dx, dw, db = _run(backend, x, w, b, x_t, w_t, b_t, target, inner, *settings, wanted)
        ctx.dtype = x.dtype
        ctx.save_for_backward(dx, dw, db, outer)
        return _reduced(loss, "sum" if count is None else "mean", count)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, db, outer = ctx.saved_tensors
        factor = grad.reshape(1) if outer is None else grad.reshape(1) * outer
        return None, *(_times(t, factor, ctx.dtype) for t in (dx, dw, db)), *[None] * 7


class RecomputedLinearDivergenceFn(torch.autograd.Function):
    """Autograd for "none": forward computes the loss, backward recomputes the logits for the gradients."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, x: Tensor, w: Tensor, b: Tensor | None, x_t: Tensor, w_t: Tensor, b_t: Tensor | None,
        target: Tensor | None, settings: Settings,
    ) -> Tensor:  # fmt: skip
        ctx.backend, ctx.settings = backend, settings
        ctx.save_for_backward(x, w, b, x_t, w_t, b_t, target)
        one = x.new_ones(1, dtype=_wide(x))
        return _run(backend, x, w, b, x_t, w_t, b_t, target, one, *settings, (False, False, False))[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, target = ctx.saved_tensors
        dtype, wanted = tensors[0].dtype, list(ctx.needs_input_grad[1:4])
        inner, outer = _split(grad.contiguous(), dtype)
        _, *grads = _run(ctx.backend, *tensors, target, inner, *ctx.settings, wanted)
        return None, *(_times(t, outer, dtype) for t in grads), *[None] * 5


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def rows_of_a_chunk(n: int, v: int, itemsize: int, budget: int) -> int:
    """Return the rows of a chunk for chunk="auto": an eighth of all, fewer if two buffers of logits exceed `budget`
    bytes; a multiple of 128 rows (the tile of a matrix product), and at least 128."""
    most = budget // (2 * v * itemsize) // 128 * 128
    return max(128, min(most, -(-n // 1024) * 128))


def _check(op: str, student: Head, teacher: Head, target: Tensor | None, k: int) -> None:
    for names, (x, w, b) in ((("x", "linear_weight", "linear_bias"), student),
                             (("teacher_x", "teacher_weight", "teacher_bias"), teacher)):  # fmt: skip
        check_float(op, names[0], x)
        check_float(op, names[1], w)
        if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1]:
            shapes = f"{names[0]} {tuple(x.shape)} and {names[1]} {tuple(w.shape)}"
            raise ValueError(f"{op}: {shapes}, expected (N, C) and (V, C)")
        check_like(op, names[1], w, tuple(w.shape), student[0], (x.dtype,), f"to match {names[0]}")
        check_like(op, names[2], b, (w.shape[0],), x, (x.dtype,), f"to match {names[1]}'s rows")
    n, least = student[0].shape[0], min(student[1].shape[0], teacher[1].shape[0])
    if teacher[0].shape[0] != n:
        raise ValueError(f"{op}: teacher_x has {teacher[0].shape[0]} rows, expected {n}, the rows of x")
    if not 1 <= k <= least:
        raise ValueError(f"{op}: vocab_size is {k}, expected 1 to {least}, the rows of both weights")
    check_like(op, "target", target, (n,), student[0], (torch.int64,), "to match x's rows")


def _self_check(backend: str, device: torch.device) -> float:
    """Compare rows of few and of many classes, with padding and an ignored row, in fp32 and 16 bits; and heads whose
    products are exact in TF32 too."""
    g = torch.Generator().manual_seed(0)
    shapes = (7, 8), (33, 8), (7, 5), (36, 5)
    x, w, x_t, w_t = (torch.randint(-2, 3, s, generator=g).to(device, torch.float32) for s in shapes)
    options = (2, 0.3, 8.0, -100, 30, 3, [False, False, False])
    loss = LINEAR_DIVERGENCE_FWD[backend](x, w, None, x_t, w_t, None, None, x.new_ones(1), *options)[0]
    tensors = (t.double() for t in (x, w, x_t, w_t))
    settings: dict[str, Any] = dict(kind="jsd", beta=0.3, temperature=8.0, vocab_size=30, reduction="none")
    worst = relative_error([loss], [linear_divergence_ref(*tensors, **settings)])
    for v, dtype in ((203, torch.float32), (50304, torch.bfloat16)):
        z, z_t = (torch.randn(5, v, device=device).to(dtype) for _ in range(2))
        target, scale = torch.tensor([0, -100, 1, 2, 3], device=device), torch.rand(5, device=device)
        for kind in KINDS:
            leaf = z.double().requires_grad_()
            loss = divergence_ref(leaf[:, : v - 3], z_t[:, : v - 3].double(), kind, 0.3, 1.5)
            exact = torch.where(target == -100, 0.0, loss)
            (grad,) = torch.autograd.grad(exact, leaf, scale.double())
            got, out = z.clone(), torch.empty(5, device=device)
            LINEAR_DIVERGENCE_ROWS[backend](got, out, z_t, target, scale, KINDS.index(kind), 0.3, 1.5, -100, v - 3)
            worst = max(worst, relative_error([out, got], [exact.detach(), grad]))
    return worst


register("linear_divergence", _self_check, cuda=Cell(), triton=Cell(), cpu=Cell())


def linear_divergence(
    x: Tensor,
    linear_weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk: int | str = "auto",
) -> Tensor:
    """Compute a divergence between the distributions of two linear heads over one vocabulary; the module's docstring
    has the formulas and the source.

    Args:
        x: (N, C) fp32, bf16, fp16 or fp64, the student's. Under autocast both sides are cast to its dtype.
        linear_weight: (V, C) in x's dtype.
        teacher_x: (N, C_t), the teacher's; its width and dtype may differ from x's. It gets no gradient.
        teacher_weight: (V_t, C_t) in teacher_x's dtype; gets no gradient.
        target: (N,) int64 or None; rows where it is ignore_index have loss and gradient 0. Other values do not matter.
        linear_bias, teacher_bias: (V,) and (V_t,), or None.
        kind: "forward_kl" (teacher to student), "reverse_kl" or "jsd".
        beta: share of the teacher in the mixture of "jsd", between 0 and 1; not used by the others.
        temperature: divides both logits. The loss is not multiplied by its square.
        vocab_size: classes that exist, by default V; the rest is padding with gradient 0. Required if V_t < V.
        ignore_index: see target.
        reduction: "none", "sum", or "mean" over the rows that count.
        chunk: rows of logits in memory at a time. "auto": an eighth of the rows, fewer if the logits of both would take
            more than 1/16 of the GPU's memory (elsewhere 512 MiB), and a multiple of 128.

    Returns:
        The loss in fp32 (fp64 for fp64 input), (N,) for reduction "none", else 0-dim.

    Raises:
        ValueError, TypeError: with the argument, the value received and the value expected.

    Example:
        >>> import torch
        >>> from fastgpt import ops
        >>> x, head = torch.randn(64, 32, requires_grad=True), torch.randn(1000, 32, requires_grad=True)
        >>> teacher_x, teacher_head = torch.randn(64, 48), torch.randn(1000, 48)
        >>> loss = ops.linear_divergence(x, head, teacher_x, teacher_head, kind="jsd", beta=0.5, chunk=16)
        >>> loss.backward()
        >>> head.grad.shape
        torch.Size([1000, 32])
    """
    op = "linear_divergence"
    k = linear_weight.shape[0] if vocab_size is None and isinstance(linear_weight, Tensor) else vocab_size
    student, teacher = (x, linear_weight, linear_bias), (teacher_x, teacher_weight, teacher_bias)
    _check(op, student, teacher, target, k)  # type: ignore[arg-type]
    if kind not in KINDS:
        raise ValueError(f"{op}: kind is {kind!r}, expected {', '.join(map(repr, KINDS))}")
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"{op}: beta is {beta}, expected a number between 0 and 1; use a KL for the ends")
    if not 0 < temperature < math.inf:  # math.isfinite is not traced
        raise ValueError(f"{op}: temperature is {temperature}, expected a number above 0")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{op}: reduction is {reduction!r}, expected 'none', 'mean' or 'sum'")
    if chunk != "auto" and not (isinstance(chunk, int) and chunk >= 1):
        raise ValueError(f"{op}: chunk is {chunk!r}, expected 'auto' or a number of rows")
    x, linear_weight, linear_bias = autocast(*student)  # type: ignore[assignment]
    x_t, w_t, b_t = (None if t is None else t.detach() for t in autocast(*teacher))
    (n, _), v = x.shape, max(linear_weight.shape[0], teacher_weight.shape[0])
    size = max(x.element_size(), teacher_x.element_size())
    rows = rows_of_a_chunk(n, v, size, logits_budget(x.device)) if isinstance(chunk, str) else chunk
    settings: Settings = (KINDS.index(kind), float(beta), float(temperature), ignore_index, k, rows)  # type: ignore
    heads: Any = (x, linear_weight, linear_bias, x_t, w_t, b_t)
    backend, count = select(op, x), None
    if reduction == "mean":
        counted = x.new_full((), n) if target is None else (target != ignore_index).sum()
        count = counted.to(torch.float32).reshape(1)
    if not needs_grad(*heads[:3]):
        one = x.new_ones(1, dtype=_wide(x))
        loss = _run(backend, *heads, target, one, *settings, (False, False, False))[0]
        return _reduced(loss, reduction, count)
    if reduction == "none":
        return RecomputedLinearDivergenceFn.apply(backend, *heads, target, settings)
    wanted = tuple(t is not None and t.requires_grad for t in heads[:3])
    return LinearDivergenceFn.apply(backend, *heads, target, count, settings, wanted)
