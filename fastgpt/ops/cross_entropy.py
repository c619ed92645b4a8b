"""Cross-entropy over logits; on request the gradient overwrites the logits.

Row i with target y, classes K = vocab_size, class weights w (1 if absent), label smoothing e:

    z    = softcap * tanh(logits / softcap)      (z = logits without softcap)
    lse  = log sum_{c < K} exp(z_c)
    loss = (1 - e) w_y (lse - z_y) + e/K sum_c w_c (lse - z_c) + z_loss lse^2
    dloss/dz_c = p_c [(1 - e) w_y + e/K sum(w) + 2 z_loss lse] - (1 - e) w_y [c = y] - e/K w_c

A row whose target is ignore_index has loss and gradient 0. "mean" divides by the sum of w_y over the other rows (their
number without weights), as torch.nn.functional.cross_entropy does. Without inplace, forward reads the logits, and
backward reads them again and writes the gradient. With inplace, loss and gradient take one read and one write of the
logits, and backward only rescales rows whose upstream gradient is not 1. Sources: Szegedy et al. 2015
(arXiv:1512.00567, smoothing), Chowdhery et al. 2022 (arXiv:2204.02311, z-loss), Gemma 2 (arXiv:2408.00118, softcap).

Saved for backward: the logits, and max z and sum exp(z - max) of each row in fp32; with inplace the gradient alone.

Determinism: bitwise. The losses of the rows are summed in fp64 in a fixed order.

Limits: integer targets and (N, V) logits only. With inplace, backward runs once and the logits are lost. First
derivatives only.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.core.backend import Cell, checks_values, register, select
from fastgpt.ops._common import (
    check_float,
    check_like,
    define,
    fp64_results,
    mark_mutated,
    needs_grad,
    no_outputs,
    relative_error,
)

OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float softcap, int vocab_size"
Options = tuple[int, float, float, float, int]


def _fwd_fake(logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    n = logits.shape[0]
    return logits.new_empty((n,), dtype=torch.float32), logits.new_empty((2, n), dtype=torch.float32)


def _bwd_fake(
    dloss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, weight: Tensor | None, *options: Any
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


CROSS_ENTROPY_FWD = define(
    "cross_entropy",
    "cross_entropy_fwd",
    f"(Tensor logits, Tensor target, Tensor? weight, {OPTIONS}) -> (Tensor, Tensor)",
    _fwd_fake,
)
CROSS_ENTROPY_BWD = define(
    "cross_entropy",
    "cross_entropy_bwd",
    f"(Tensor dloss, Tensor logits, Tensor target, Tensor stats, Tensor? weight, {OPTIONS}) -> Tensor",
    _bwd_fake,
)
CROSS_ENTROPY_FWD_BWD = define(
    "cross_entropy",
    "cross_entropy_fwd_bwd",
    f"(Tensor(a!) logits, Tensor(b!) loss, Tensor target, Tensor? weight, Tensor scale, {OPTIONS}) -> ()",
    no_outputs,
)
SCALE_ROWS = define("cross_entropy", "scale_rows", "(Tensor(a!) x, Tensor scale) -> ()", no_outputs)


def cross_entropy_ref(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    vocab_size: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute the formula at the head of this file, in fp32 (fp64 for fp64 logits). The parity tests take it as the
    truth.

    A row whose target is outside [0, vocab_size) and not ignore_index has a NaN loss and a zero gradient.
    """
    k = logits.shape[-1] if vocab_size is None else vocab_size
    z = logits[:, :k].to(torch.promote_types(logits.dtype, torch.float32))
    z = softcap * torch.tanh(z / softcap) if softcap > 0 else z
    w = z.new_ones(k) if weight is None else weight.to(z.dtype)
    bad = ((target < 0) | (target >= k)) & (target != ignore_index)
    counted = (target != ignore_index) & ~bad
    safe = torch.where(counted, target, 0)
    logp = z.log_softmax(-1)
    lse = z.logsumexp(-1)
    w_y = w[safe]
    loss = -(1 - label_smoothing) * w_y * logp.gather(1, safe[:, None])[:, 0] + z_loss * lse.square()
    if label_smoothing > 0:
        loss = loss - label_smoothing / k * (torch.where(w == 0, 0, logp) * w).sum(-1)
    loss = torch.where(counted, loss, torch.where(bad, torch.nan, 0.0).to(loss.dtype))
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (w_y * (target != ignore_index)).sum()


def cross_entropy_torch(logits: Tensor, target: Tensor, options: dict[str, Any]) -> Tensor:
    """Serve the `torch` backend and the parity baseline: PyTorch's op on fp32 logits, or the formula for what PyTorch
    lacks."""
    plain = options["z_loss"] == 0 and options["softcap"] == 0
    if plain and options["vocab_size"] in (None, logits.shape[-1]):
        names = ("weight", "ignore_index", "label_smoothing", "reduction")
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide, target, **{n: options[n] for n in names})
    return cross_entropy_ref(logits, target, **options)


def denominator(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """Return the divisor of "mean" as a (1,) fp32 tensor on the device, without a sync."""
    counted = target != ignore_index
    if weight is None:
        return counted.sum(dtype=torch.float32).reshape(1)
    inside = target.clamp(0, weight.shape[0] - 1)
    return torch.where(counted, weight[inside], 0.0).sum().reshape(1)


class CrossEntropyFn(torch.autograd.Function):
    """Autograd over the raw ops, which leave the logits unchanged. Losses are fp32, reduced as requested."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        reduction: str,
        options: Options,
    ) -> Tensor:
        loss, stats = CROSS_ENTROPY_FWD[backend](logits, target, weight, *options)
        count = denominator(target, weight, options[0]) if reduction == "mean" else None
        ctx.backend, ctx.reduction, ctx.options = backend, reduction, options
        ctx.save_for_backward(logits, target, stats, weight, count)
        return reduce_rows(loss, reduction, count)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, stats, weight, count = ctx.saved_tensors
        rows = grad if count is None else grad / count
        dloss = rows.float().reshape(-1).contiguous()  # (1,), or (N,) for reduction "none"
        dlogits = CROSS_ENTROPY_BWD[ctx.backend](dloss, logits, target, stats, weight, *ctx.options)
        return None, dlogits, None, None, None, None


class CrossEntropyInplaceFn(torch.autograd.Function):
    """Autograd over the one-pass raw op: forward replaces the logits with their gradient, backward rescales it."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        reduction: str,
        options: Options,
    ) -> Tensor:
        loss = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        count = denominator(target, weight, options[0]) if reduction == "mean" else None
        scale = torch.ones_like(loss[:1]) if count is None else count.reciprocal()
        CROSS_ENTROPY_FWD_BWD[backend](logits, loss, target, weight, scale, *options)
        mark_mutated([logits])
        ctx.backend = backend
        ctx.save_for_backward(logits)
        return reduce_rows(loss, reduction, count)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (dlogits,) = ctx.saved_tensors
        SCALE_ROWS[ctx.backend](dlogits, grad.float().reshape(-1).contiguous())
        mark_mutated([dlogits])
        return None, dlogits, None, None, None, None


def reduce_rows(loss: Tensor, reduction: str, count: Tensor | None) -> Tensor:
    """Return the losses, their sum, or the sum divided by `count`, in fp32. The sum is fp64, so it is rounded once."""
    if reduction == "none":
        return loss
    total = loss.sum(dtype=torch.float64)
    return (total if count is None else total / count[0]).float()


def check_loss(
    op: str,
    shape: tuple[int, int],
    names: tuple[str, str],
    like: Tensor,
    target: Tensor,
    weight: Tensor | None,
    smoothing: float,
    k: int,
    reduction: str,
) -> None:
    """Raise unless the arguments of a loss fit logits of shape (N, V); errors call the two dimensions `names`."""
    n, v = shape
    if not 1 <= k <= v:
        raise ValueError(f"{op}: vocab_size is {k}, expected 1 to {v}, {names[1]}")
    check_like(op, "target", target, (n,), like, (torch.int64,), f"to match {names[0]}")
    dtypes = (torch.promote_types(like.dtype, torch.float32), torch.float32, torch.bfloat16, torch.float16)
    check_like(op, "weight", weight, (k,), like, dtypes, "to match vocab_size")
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing is {smoothing}, expected 0 to 1")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{op}: reduction is {reduction!r}, expected 'none', 'mean' or 'sum'")


def widened(weight: Tensor | None, like: Tensor) -> Tensor | None:
    """Return the class weights as the kernels read them: fp32 (fp64 for fp64 logits)."""
    return None if weight is None else weight.to(torch.promote_types(like.dtype, torch.float32))


def check_values(op: str, target: Tensor, ignore_index: int, k: int) -> None:
    """Raise if a target is neither in [0, k) nor ignore_index. Checked on a CPU; on a GPU only with FASTGPT_CHECK=1."""
    if not checks_values(target) or target.numel() == 0:
        return
    low, high = target.aminmax()
    if int(low) >= 0 and int(high) < k:
        return
    bad = ((target < 0) | (target >= k)) & (target != ignore_index)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        got = int(target[row])
        raise ValueError(f"{op}: target[{row}] is {got}, expected 0 to {k - 1} or ignore_index ({ignore_index})")


def _check_inplace(logits: Tensor) -> None:
    if logits.stride(1) != 1 or logits.stride(0) < logits.shape[1]:
        raise ValueError(
            f"cross_entropy: logits have strides {logits.stride()}, "
            "expected contiguous rows that do not overlap for inplace=True"
        )
    if not torch.compiler.is_compiling() and logits.is_leaf and logits.requires_grad:
        raise ValueError("cross_entropy: inplace=True would overwrite a leaf that requires grad; pass an op's output")


def _self_check(backend: str, device: torch.device) -> float:
    logits, target = torch.randn(5, 203, device=device), torch.tensor([0, 199, 7, -100, 50], device=device)
    options: Options = (-100, 0.1, 1e-3, 5.0, 200)
    error = _error(backend, logits, target, torch.rand(5, device=device), options)
    # as in training: kernels without options, in 16 bits, of rows that are held and of rows too long for that
    for columns in (50304, 65536) if backend != "cpu" else ():
        logits = torch.randn(3, columns, device=device).bfloat16()
        target = torch.tensor([0, columns - 48, -100], device=device)
        plain: Options = (-100, 0.0, 0.0, 0.0, columns - 47)
        error = max(error, _error(backend, logits, target, torch.ones(3, device=device), plain))
    return error


def _error(backend: str, logits: Tensor, target: Tensor, dloss: Tensor, options: Options) -> float:
    loss, stats = CROSS_ENTROPY_FWD[backend](logits, target, None, *options)
    dlogits = CROSS_ENTROPY_BWD[backend](dloss, logits, target, stats, None, *options)
    fused, fused_loss = logits.clone(), torch.empty_like(loss)
    CROSS_ENTROPY_FWD_BWD[backend](fused, fused_loss, target, None, dloss, *options)
    halved = dlogits.clone()
    SCALE_ROWS[backend](halved, torch.full((1,), 0.5, device=logits.device))
    names = ("ignore_index", "label_smoothing", "z_loss", "softcap", "vocab_size")
    named: dict[str, Any] = dict(zip(names, options))
    ref = partial(cross_entropy_ref, target=target, reduction="none", **named)
    exact, grad = fp64_results(ref, (logits,), (dloss,))
    return relative_error([loss, dlogits, fused_loss, fused, halved], [exact, grad, exact, grad, grad / 2])


register("cross_entropy", _self_check, cuda=Cell(), triton=Cell(), cpu=Cell())


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    vocab_size: int | None = None,
    reduction: str = "mean",
    inplace: bool = False,
) -> Tensor:
    """Compute softmax cross-entropy with integer targets; the module's docstring has the formula and the sources.

    Args:
        logits: (N, V) fp32, bf16, fp16 (fp64 on the reference).
        target: (N,) int64 in [0, vocab_size) or ignore_index.
        weight: (vocab_size,) class weights, fp32 or 16 bits, read as fp32 (fp64 for fp64 logits).
        ignore_index: target of rows that are not counted.
        label_smoothing: share of the target spread over all classes; 0 means off.
        z_loss: factor of the squared log-sum-exp, which is added to the loss; 0 means off.
        softcap: logits become softcap * tanh(logits / softcap); 0 means off.
        vocab_size: columns that exist; later columns are padding (excluded, gradient 0). Default: V.
        reduction: "none", "sum" or "mean".
        inplace: with gradients on, forward overwrites the logits with their gradient (one read, one write). Nothing
            else may use the logits afterwards, and backward runs once.

    Returns:
        The loss, (N,) for reduction "none", else 0-dim; fp32 on kernels and for 16-bit logits.

    Raises:
        ValueError, TypeError: with the argument, the value received and the value expected. On a CPU that includes
            targets out of range. On a GPU such a target gives a NaN loss and a zero gradient; with FASTGPT_CHECK=1 the
            call waits for the device and raises.

    Example:
        >>> import torch
        >>> from fastgpt import ops
        >>> logits = torch.randn(8, 128, requires_grad=True)  # 100 classes, padded to 128
        >>> loss = ops.cross_entropy(logits, torch.randint(100, (8,)), vocab_size=100, z_loss=1e-4)
        >>> loss.backward()
        >>> bool((logits.grad[:, 100:] == 0).all())
        True
    """
    check_float("cross_entropy", "logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"cross_entropy: logits has shape {tuple(logits.shape)}, expected (N, V) with V >= 1")
    k = logits.shape[1] if vocab_size is None else vocab_size
    sides, shape = ("logits' rows", "the columns of logits"), (logits.shape[0], logits.shape[1])
    check_loss("cross_entropy", shape, sides, logits, target, weight, label_smoothing, k, reduction)
    check_values("cross_entropy", target, ignore_index, k)
    weight = widened(weight, logits)
    backend = select("cross_entropy", logits)
    if backend == "torch":
        options = dict(
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            vocab_size=vocab_size,
            reduction=reduction,
        )
        return cross_entropy_torch(logits, target, options)
    if not inplace and logits.stride(1) != 1:
        logits = logits.contiguous()  # kernels support any stride between rows, but need contiguous rows
    packed = (ignore_index, float(label_smoothing), float(z_loss), float(softcap), k)
    if needs_grad(logits):
        if not inplace:
            return CrossEntropyFn.apply(backend, logits, target, weight, reduction, packed)
        _check_inplace(logits)
        return CrossEntropyInplaceFn.apply(backend, logits, target, weight, reduction, packed)
    loss, _ = CROSS_ENTROPY_FWD[backend](logits, target, weight, *packed)
    return reduce_rows(loss, reduction, denominator(target, weight, ignore_index) if reduction == "mean" else None)
