"""Divergence between two rows of logits, with its gradient written over the student's.

K = vocab_size, t = temperature, p and q the softmaxes of the teacher's and the student's logits / t, m = beta p +
(1 - beta) q:
    forward_kl   l = sum p (log p - log q)                   dl/dz = (q - p) / t
    reverse_kl   l = sum q (log q - log p)                   dl/dz = q (log q - log p - l) / t
    jsd          l = beta KL(p || m) + (1 - beta) KL(q || m) dl/dz = (1 - beta) q (log q - log m - KL(q || m)) / t
Generalised JSD: arXiv:2306.13649; online softmax: arXiv:1805.02867.

Fused: temperature, both softmaxes, divergence, gradient, rows that do not count, the factor of each row. Columns >= K
get gradient 0. 0 log 0 is 0.
Bytes an element: both logits are read once and the student's are written once; the second and third pass over a row
read L2. Nothing is saved for backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._runtime import (
    Configuration,
    cast,
    ceil_pow2,
    exp,
    interpreted,
    jit_kernel,
    log,
    on_device,
    pointers,
    powers_of_two,
    quick_width,
    split_meta,
)

FORWARD_KL, REVERSE_KL, JSD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _add(z, m, s):
    """Add columns z (ROWS, BLOCK) to the maximum (ROWS, 1) and to the max-shifted sums of each lane (ROWS, BLOCK)."""
    m_new = tl.maximum(m, tl.max(z, axis=1, keep_dims=True))
    finite = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - -inf is NaN
    return m_new, s * exp(m - finite) + exp(z - finite)


@triton.jit
def _total(lanes):
    """Return the sum of each row's lanes (ROWS, 1), rounded once."""
    return tl.sum(lanes.to(tl.float64), axis=1, keep_dims=True).to(tl.float32)


@triton.jit
def _expm1(x):
    """Return e^x - 1 for x <= 0: e - 1 over its logarithm has the error of neither (Higham 2002, section 1.14.1)."""
    x = tl.maximum(x, -30.0)
    e = exp(x)
    near = e == 1.0
    return tl.where(near, x, (e - 1.0) * x / tl.where(near, 1.0, log(e)))


@triton.jit
def _log1p(x):
    """Return log(1 + x) for -1 < x <= 0, in the same way."""
    y = 1.0 + x
    near = y == 1.0
    return tl.where(near, x, log(y) * x / tl.where(near, 1.0, y - 1.0))


@triton.jit
def _terms(x, y, inv_q, inv_p, log_ratio, beta, mask, KIND: tl.constexpr):
    """Return p, q, what the gradient weights q with, and the shares of both sums over the row, from shifted logits x
    (student) and y (teacher).

    log p - log q is a difference of shifted logits and one logarithm for the row, so little is lost where p and q are
    close. With m = beta p + (1 - beta) q and d = log p - log q,
        log(q / m) = -log1p(beta (e^d - 1)),   log(p / m) = log(q / m) + d,
    which for d > 0 is taken with p and q, and beta and 1 - beta, exchanged: e^d cannot overflow.
    """
    x, y = tl.where(mask, x, 0.0), tl.where(mask, y, 0.0)
    q, p = tl.where(mask, exp(x), 0.0), tl.where(mask, exp(y), 0.0)
    d = (y - x) + log_ratio
    gap, of_p, of_q = q * 0.0, q * 0.0, q * 0.0
    if KIND == FORWARD_KL:
        of_p = p * tl.where(p != 0.0, d, 0.0)
    if KIND == REVERSE_KL:
        gap = tl.where(q != 0.0, -d, 0.0)
        of_q = q * gap
    p, q = p * inv_p, q * inv_q
    if KIND == JSD:
        less = d < 0.0  # p is less than q
        low = tl.where(less, d, -d)
        of_larger = -_log1p(tl.where(less, beta, 1.0 - beta) * _expm1(low))
        of_smaller = of_larger + low
        gap = tl.where(q >= 1e-37, tl.where(less, of_larger, of_smaller), 0.0)
        of_q = q * gap
        of_p = p * tl.where(p >= 1e-37, tl.where(less, of_smaller, of_larger), 0.0)
    return p, q, gap, of_p, of_q


@jit_kernel(do_not_specialize=["N", "ignore_index", "beta", "temperature", "scale_step"])
def linear_divergence_rows_kernel(
    logits_ptr,  # (N, V), rows logits_row apart; overwritten by the gradient
    loss_ptr,  # (N) fp32
    teacher_ptr,  # (N, >= K), rows teacher_row apart
    target_ptr,  # (N) int64 or None
    scale_ptr,  # fp32, scale_step apart
    scale_step, logits_row, teacher_row, N, K, V,
    ignore_index, beta, temperature,
    KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute loss and gradient of ROWS rows per program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    in_batch = row < N
    counted = in_batch
    if target_ptr is not None:
        counted = in_batch & (tl.load(target_ptr + row, in_batch, other=0) != ignore_index)
    logits_ptr += row * logits_row
    teacher_ptr += row * teacher_row
    m_s = tl.full([ROWS, 1], float("-inf"), tl.float32)
    m_t = tl.full([ROWS, 1], float("-inf"), tl.float32)
    l_s = tl.zeros([ROWS, BLOCK], tl.float32)  # a sum for each lane, so few values meet in fp32
    l_t = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        c = start + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
        mask = counted & (c < K)
        z = tl.load(logits_ptr + c, mask, other=float("-inf")).to(tl.float32) / temperature
        z_t = tl.load(teacher_ptr + c, mask, other=float("-inf")).to(tl.float32) / temperature
        m_s, l_s = _add(z, m_s, l_s)
        m_t, l_t = _add(z_t, m_t, l_t)
    s_s, s_t = tl.where(counted, _total(l_s), 1.0), tl.where(counted, _total(l_t), 1.0)
    m_s, m_t = tl.where(counted, m_s, 0.0), tl.where(counted, m_t, 0.0)
    inv_q, inv_p, log_ratio = 1.0 / s_s, 1.0 / s_t, log(s_s / s_t)
    l_p = tl.zeros([ROWS, BLOCK], tl.float32)
    l_q = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        c = start + tl.arange(0, BLOCK)[None, :]
        mask = counted & (c < K)
        z = tl.load(logits_ptr + c, mask, other=0.0).to(tl.float32) / temperature
        z_t = tl.load(teacher_ptr + c, mask, other=0.0).to(tl.float32) / temperature
        p, q, gap, of_p, of_q = _terms(z - m_s, z_t - m_t, inv_q, inv_p, log_ratio, beta, mask, KIND)
        l_p += of_p
        l_q += of_q
    sum_p, sum_q = _total(l_p), _total(l_q)
    mean = sum_q
    if KIND == FORWARD_KL:
        loss = sum_p / s_t
    elif KIND == REVERSE_KL:
        mean = sum_q / s_s
        loss = mean
    else:
        loss = beta * sum_p + (1.0 - beta) * sum_q
    tl.store(loss_ptr + row, tl.where(counted, loss, 0.0), in_batch)
    factor = tl.load(scale_ptr + row * scale_step, in_batch, other=0.0) / temperature
    if KIND == JSD:
        factor *= 1.0 - beta
    for start in range(0, V, BLOCK):
        c = start + tl.arange(0, BLOCK)[None, :]
        mask = counted & (c < K)
        z = tl.load(logits_ptr + c, mask, other=0.0).to(tl.float32) / temperature
        z_t = tl.load(teacher_ptr + c, mask, other=0.0).to(tl.float32) / temperature
        p, q, gap, of_p, of_q = _terms(z - m_s, z_t - m_t, inv_q, inv_p, log_ratio, beta, mask, KIND)
        if KIND == FORWARD_KL:
            grad = q - p
        else:
            grad = q * (gap - mean)
        grad = tl.where(mask, grad * factor, 0.0)
        tl.store(logits_ptr + c, cast(grad, logits_ptr.dtype.element_ty), in_batch & (c < V))


def rows_meta(K: int) -> dict[str, int]:
    """Return the launch shape for K classes: several short rows per program, long rows in column blocks."""
    most, elements, rows = (4096, 1 << 17, 64) if interpreted() else (2048, 512, 4)
    block = min(max(32, ceil_pow2(K)), most)
    rows = max(1, min(rows, elements // block))
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(4, min(8, rows * block // 256))}


def linear_divergence_rows(
    logits: Tensor, loss: Tensor, teacher: Tensor, target: Tensor | None, scale: Tensor, kind: int, beta: float,
    temperature: float, ignore_index: int, vocab_size: int,
) -> None:  # fmt: skip
    """Write loss (N,) and overwrite logits with the gradient of sum(scale * loss); scale (1,) or (N,)."""
    N, V = logits.shape
    if not N:
        return
    teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
    target = None if target is None else target.contiguous()
    meta = rows_meta(vocab_size)
    step = 0 if scale.numel() == 1 else scale.stride(0)
    with on_device(logits):
        linear_divergence_rows_kernel[(triton.cdiv(N, meta["ROWS"]),)](
            logits, loss, teacher, target, scale, step, logits.stride(0), teacher.stride(0), N, vocab_size, V,
            ignore_index, beta, temperature, KIND=kind, **meta,
        )  # fmt: skip


def configurations(dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Iterator[Configuration]:
    """Yield every launch shape of every kind."""
    f32 = torch.float32
    sizes = {name: "i32" for name in ("scale_step", "logits_row", "teacher_row", "N", "K", "V", "ignore_index")}
    tensors = pointers(logits_ptr=dtype, loss_ptr=f32, teacher_ptr=dtype, target_ptr=torch.int64, scale_ptr=f32)
    types = {**tensors, **sizes, "beta": "fp32", "temperature": "fp32"}
    for kind, name in enumerate(("forward_kl", "reverse_kl", "jsd")):
        for block in powers_of_two(32, 2048):
            meta, warps = split_meta(rows_meta(block))
            case = f"K={block} {name}"
            flags = {"KIND": kind, **meta}
            yield Configuration(linear_divergence_rows_kernel, case, types, warps, flags, quick=quick_width(block))
