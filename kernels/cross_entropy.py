"""Cross-entropy over rows of logits: loss, gradient, or both at once with the gradient written over the logits.

K = vocab_size, z = softcap * tanh(logits / softcap) (or the logits), lse = log sum_c exp(z_c), y the target:
    l = (1 - ls) w_y (lse - z_y) + (ls / K) sum_c w_c (lse - z_c) + z_loss lse^2
    dl/dz_c = p_c [(1 - ls) w_y + (ls / K) sum(w) + 2 z_loss lse] - (1 - ls) w_y [c = y] - (ls / K) w_c
    dl/dlogits_c = dl/dz_c (1 - (z_c / softcap)^2)
Label smoothing: arXiv:1512.00567; z-loss: arXiv:2204.02311; online softmax: arXiv:1805.02867.

Fused: softmax, loss and every option. Columns >= K (padding) are ignored and get gradient 0. A row with target
ignore_index has loss and gradient 0, and its logits are not read for a gradient. Another target outside [0, K) gives
loss NaN and gradient 0. All values are relative to the maximum of the row or to z_y, so a large common offset does not
cancel.
Bytes an element: fwd reads once; bwd reads and writes once, and so does fwd_bwd, whose second pass over a row reads L2.
For vocabularies around 32,000 and 50,304 in 16 bits fwd_bwd without options holds a row in registers instead
(_cross_entropy_held.py).
Saved for backward: m = max_c z_c and s = sum_c exp(z_c - m) of each row in fp32, and the logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._cross_entropy_held import cross_entropy_held_kernel, held_configurations, held_meta
from ._math import tanh
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
    processors,
    quick_width,
    split_meta,
)


@triton.jit
def _capped(x, softcap, CAP: tl.constexpr):
    """Return z of logits x (fp32)."""
    if CAP:
        return softcap * tanh(x / softcap)
    else:
        return x


@triton.jit
def _row_terms(target_ptr, logits_ptr, offset, weight_ptr, row, in_batch, K, ignore_index, softcap, CAP: tl.constexpr):
    """Return per row (ROWS, 1): target, whether it is ignored, whether it is in [0, K) and not ignored, z_y, w_y."""
    y = tl.load(target_ptr + row, in_batch, other=0)
    ignored = y == ignore_index
    valid = in_batch & (y >= 0) & (y < K) & (ignored == 0)
    z_y = _capped(tl.load(logits_ptr + offset + y, valid, other=0.0).to(tl.float32), softcap, CAP)
    w_y = tl.where(valid, 1.0, 0.0)
    if weight_ptr is not None:
        w_y = tl.load(weight_ptr + y, valid, other=0.0)
    return y, ignored, valid, z_y, w_y


@triton.jit
def _softmax_sums(
    logits_ptr, offset, rows_mask, weight_ptr, shift, softcap, K, V,
    SMOOTH: tl.constexpr, CAP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return per row (ROWS, 1), online: m = max z, s = sum exp(z - m) and, if SMOOTH, sum w_c (z_c - shift)."""
    m = tl.full([ROWS, 1], float("-inf"), tl.float32)
    s = tl.zeros([ROWS, 1], tl.float32)
    weighted = tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, K, BLOCK):
        c = start + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
        mask = rows_mask & (c < K)
        # read up to V instead of K, because an odd K would break up the vector loads
        x = tl.load(logits_ptr + offset + c, rows_mask & (c < V), other=0.0).to(tl.float32)
        z = _capped(x, softcap, CAP)
        if SMOOTH:
            from_shift = tl.where(mask, z - shift, 0.0)
            if weight_ptr is not None:
                from_shift *= tl.load(weight_ptr + c, c < K, other=0.0)
            weighted += tl.sum(from_shift, axis=1, keep_dims=True)
        z = tl.where(mask, z, float("-inf"))
        m_new = tl.maximum(m, tl.max(z, axis=1, keep_dims=True))
        finite = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - -inf is NaN
        s = s * exp(m - finite) + tl.sum(exp(z - finite), axis=1, keep_dims=True)
        m = m_new
    return m, s, weighted


@triton.jit
def _loss(m, s, weighted, shift, z_y, w_y, w_sum, ignored, valid, label_smoothing, z_loss, K, SMOOTH: tl.constexpr):
    """Return the loss of each row from its sums."""
    log_s = log(s)
    lse = m + log_s
    loss = (1.0 - label_smoothing) * w_y * ((m - z_y) + log_s)
    if SMOOTH:
        loss += label_smoothing / K * (w_sum * ((m - shift) + log_s) - weighted)
    loss += z_loss * lse * lse
    return tl.where(ignored, 0.0, tl.where(valid, loss, float("nan")))


@triton.jit
def _store_gradient(
    logits_ptr, offset, dlogits_ptr, d_offset, in_batch, valid, y, w_y, w_sum, weight_ptr, m, s, scale,
    label_smoothing, z_loss, softcap, K, V, SMOOTH: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store all V columns of the gradient; p = exp(z - m) / s."""
    # with one class p is 1 and its terms cancel those of the target: leave both out instead of subtracting them
    at_target = tl.where(K > 1, (1.0 - label_smoothing) * w_y, 0.0)  # (ROWS, 1)
    smooth = tl.where(K > 1, label_smoothing / K, 0.0)
    of_p = at_target + 2.0 * z_loss * (m + log(s))
    if SMOOTH:
        of_p += smooth * w_sum
    of_p = of_p / s
    for start in range(0, V, BLOCK):
        c = start + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
        mask = valid & (c < K)
        x = tl.load(logits_ptr + offset + c, valid & (c < V), other=0.0).to(tl.float32)
        z = _capped(x, softcap, CAP)
        grad = exp(z - m) * of_p - tl.where(c == y, at_target, 0.0)
        if SMOOTH:
            if weight_ptr is not None:
                grad -= smooth * tl.load(weight_ptr + c, c < K, other=0.0)
            else:
                grad -= smooth
        if CAP:
            t = z / softcap
            grad *= 1.0 - t * t
        grad = tl.where(mask, grad * scale, 0.0)
        tl.store(dlogits_ptr + d_offset + c, cast(grad, dlogits_ptr.dtype.element_ty), in_batch & (c < V))


@jit_kernel(do_not_specialize=["N", "ignore_index", "label_smoothing", "z_loss", "softcap"])
def cross_entropy_fwd_kernel(
    logits_ptr,  # (N, V), rows logits_row apart
    target_ptr,  # (N) int64
    weight_ptr,  # (K) fp32 or None
    weight_sum_ptr,  # (1) fp32, or None without weight
    loss_ptr,  # (N) fp32
    stats_ptr,  # (2, N) fp32: max and sum
    logits_row, N, K, V,
    ignore_index, label_smoothing, z_loss, softcap,
    SMOOTH: tl.constexpr, CAP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute loss, maximum and sum of ROWS rows per program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    in_batch = row < N
    offset = row * logits_row
    y, ignored, valid, z_y, w_y = _row_terms(
        target_ptr, logits_ptr, offset, weight_ptr, row, in_batch, K, ignore_index, softcap, CAP
    )
    shift = tl.where(tl.abs(z_y) < float("inf"), z_y, 0.0)
    m, s, weighted = _softmax_sums(
        logits_ptr, offset, in_batch, weight_ptr, shift, softcap, K, V, SMOOTH, CAP, ROWS, BLOCK
    )
    w_sum = tl.load(weight_sum_ptr) if weight_ptr is not None else K * 1.0
    loss = _loss(m, s, weighted, shift, z_y, w_y, w_sum, ignored, valid, label_smoothing, z_loss, K, SMOOTH)
    tl.store(loss_ptr + row, loss, in_batch)
    tl.store(stats_ptr + row, m, in_batch)
    tl.store(stats_ptr + N + row, s, in_batch)


@jit_kernel(do_not_specialize=["N", "ignore_index", "label_smoothing", "z_loss", "softcap", "scale_step"])
def cross_entropy_bwd_kernel(
    dloss_ptr,  # fp32, scale_step apart
    logits_ptr,  # (N, V), rows logits_row apart
    target_ptr,  # (N) int64
    stats_ptr,  # (2, N) fp32: max and sum
    weight_ptr,  # (K) fp32 or None
    weight_sum_ptr,  # (1) fp32, or None without weight
    dlogits_ptr,  # (N, V) contiguous
    scale_step, logits_row, N, K, V,
    ignore_index, label_smoothing, z_loss, softcap,
    SMOOTH: tl.constexpr, CAP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of ROWS rows per program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    in_batch = row < N
    offset = row * logits_row
    y, ignored, valid, z_y, w_y = _row_terms(
        target_ptr, logits_ptr, offset, weight_ptr, row, in_batch, K, ignore_index, softcap, CAP
    )
    scale = tl.load(dloss_ptr + row * scale_step, in_batch, other=0.0)
    m = tl.load(stats_ptr + row, valid, other=0.0)
    s = tl.load(stats_ptr + N + row, valid, other=1.0)
    w_sum = tl.load(weight_sum_ptr) if weight_ptr is not None else K * 1.0
    _store_gradient(
        logits_ptr, offset, dlogits_ptr, row * V, in_batch, valid, y, w_y, w_sum, weight_ptr, m, s, scale,
        label_smoothing, z_loss, softcap, K, V, SMOOTH, CAP, BLOCK,
    )  # fmt: skip


@jit_kernel(do_not_specialize=["N", "ignore_index", "label_smoothing", "z_loss", "softcap", "scale_step"])
def cross_entropy_fwd_bwd_kernel(
    logits_ptr,  # (N, V), rows logits_row apart; overwritten by the gradient
    loss_ptr,  # (N) fp32
    target_ptr,  # (N) int64
    weight_ptr,  # (K) fp32 or None
    weight_sum_ptr,  # (1) fp32, or None without weight
    scale_ptr,  # fp32, scale_step apart
    scale_step, logits_row, N, K, V,
    ignore_index, label_smoothing, z_loss, softcap,
    SMOOTH: tl.constexpr, CAP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute loss and gradient of ROWS rows per program; ignored rows are written but not read."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    in_batch = row < N
    offset = row * logits_row
    y, ignored, valid, z_y, w_y = _row_terms(
        target_ptr, logits_ptr, offset, weight_ptr, row, in_batch, K, ignore_index, softcap, CAP
    )
    scale = tl.load(scale_ptr + row * scale_step, in_batch, other=0.0)
    shift = tl.where(tl.abs(z_y) < float("inf"), z_y, 0.0)
    m, s, weighted = _softmax_sums(
        logits_ptr, offset, valid, weight_ptr, shift, softcap, K, V, SMOOTH, CAP, ROWS, BLOCK
    )
    w_sum = tl.load(weight_sum_ptr) if weight_ptr is not None else K * 1.0
    loss = _loss(m, s, weighted, shift, z_y, w_y, w_sum, ignored, valid, label_smoothing, z_loss, K, SMOOTH)
    tl.store(loss_ptr + row, loss, in_batch)
    tl.debug_barrier()  # every thread must have read its z_y before one is overwritten
    _store_gradient(
        logits_ptr, offset, logits_ptr, offset, in_batch, valid, y, w_y, w_sum, weight_ptr, m, s, scale,
        label_smoothing, z_loss, softcap, K, V, SMOOTH, CAP, BLOCK,
    )  # fmt: skip


@jit_kernel(do_not_specialize=["N", "scale_step"])
def scale_rows_kernel(
    x_ptr,  # (N, V), rows x_row apart, in place
    scale_ptr,  # fp32, scale_step apart
    x_row,
    scale_step,
    N,
    V,
    BLOCK: tl.constexpr,
):
    """Program p scales rows p, p + programs, ...; rows with scale 1 are skipped."""
    for i in range(tl.program_id(0), N, tl.num_programs(0)):
        row = i + tl.zeros([1], tl.int64)
        scale = tl.load(scale_ptr + row * scale_step)  # (1)
        if tl.max(tl.where(scale == 1.0, 0, 1)) > 0:
            for start in range(0, V, BLOCK):
                c = start + tl.arange(0, BLOCK)
                at = x_ptr + row * x_row + c
                x = tl.load(at, c < V, other=0.0).to(tl.float32) * scale
                tl.store(at, cast(x, x_ptr.dtype.element_ty), c < V)


def rows_meta(K: int) -> dict[str, int]:
    """Return the launch shape for K classes: several short rows per program, long rows in column blocks."""
    most, elements, rows = (4096, 1 << 17, 64) if interpreted() else (4096, 512, 4)
    block = min(max(32, ceil_pow2(K)), most)
    rows = max(1, min(rows, elements // block))
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(4, min(8, rows * block // 256))}


def scale_meta() -> dict[str, int]:
    """Return the launch shape of scale_rows."""
    return {"BLOCK": 4096, "num_warps": 8}


def _weight_sum(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.sum()


def cross_entropy_fwd(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float,
    softcap: float, vocab_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return loss (N,) and, for backward, maximum and sum of each row (2, N); fp32."""
    N = logits.shape[0]
    loss, stats = (torch.empty(s, dtype=torch.float32, device=logits.device) for s in ((N,), (2, N)))
    weight = None if weight is None else weight.contiguous()
    if N:
        meta = rows_meta(vocab_size)
        with on_device(logits):
            cross_entropy_fwd_kernel[(triton.cdiv(N, meta["ROWS"]),)](
                logits, target.contiguous(), weight, _weight_sum(weight), loss, stats, logits.stride(0), N, vocab_size,
                logits.shape[1], ignore_index, label_smoothing, z_loss, softcap, SMOOTH=label_smoothing > 0,
                CAP=softcap > 0, **meta,
            )  # fmt: skip
    return loss, stats


def cross_entropy_bwd(
    dloss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, weight: Tensor | None, ignore_index: int,
    label_smoothing: float, z_loss: float, softcap: float, vocab_size: int,
) -> Tensor:  # fmt: skip
    """Return the gradient (N, Vp) of sum(dloss * loss), contiguous, in the dtype of the logits; dloss (1,) or (N,)."""
    N, V = logits.shape
    dlogits = torch.empty((N, V), dtype=logits.dtype, device=logits.device)
    weight = None if weight is None else weight.contiguous()
    if N:
        meta = rows_meta(vocab_size)
        with on_device(logits):
            cross_entropy_bwd_kernel[(triton.cdiv(N, meta["ROWS"]),)](
                dloss, logits, target.contiguous(), stats, weight, _weight_sum(weight), dlogits, _step(dloss),
                logits.stride(0), N, vocab_size, V, ignore_index, label_smoothing, z_loss, softcap,
                SMOOTH=label_smoothing > 0, CAP=softcap > 0, **meta,
            )  # fmt: skip
    return dlogits


def cross_entropy_fwd_bwd(
    logits: Tensor, loss: Tensor, target: Tensor, weight: Tensor | None, scale: Tensor, ignore_index: int,
    label_smoothing: float, z_loss: float, softcap: float, vocab_size: int,
) -> None:  # fmt: skip
    """Write loss (N,) and overwrite logits with the gradient of sum(scale * loss); scale (1,) or (N,)."""
    N, V = logits.shape
    weight = None if weight is None else weight.contiguous()
    if not N:
        return
    plain = weight is None and label_smoothing <= 0 and softcap <= 0
    held = held_meta(logits, vocab_size) if plain else None
    with on_device(logits):
        if held is not None:
            cross_entropy_held_kernel[(N,)](
                logits, loss, target.contiguous(), scale, _step(scale), logits.stride(0), vocab_size, V,
                ignore_index, z_loss, **held,
            )  # fmt: skip
        else:
            meta = rows_meta(vocab_size)
            cross_entropy_fwd_bwd_kernel[(triton.cdiv(N, meta["ROWS"]),)](
                logits, loss, target.contiguous(), weight, _weight_sum(weight), scale, _step(scale), logits.stride(0),
                N, vocab_size, V, ignore_index, label_smoothing, z_loss, softcap, SMOOTH=label_smoothing > 0,
                CAP=softcap > 0, **meta,
            )  # fmt: skip


def scale_rows(x: Tensor, scale: Tensor) -> None:
    """Multiply x (N, Vp) by scale[row] in place; scale (1,) or (N,)."""
    N, V = x.shape
    if N and V:
        programs = min(N, 2 if interpreted() else 8 * processors(x.device))
        with on_device(x):
            scale_rows_kernel[(programs,)](x, scale, x.stride(0), _step(scale), N, V, **scale_meta())


def _step(scale: Tensor) -> int:
    return 0 if scale.numel() == 1 else scale.stride(0)


def configurations(dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Iterator[Configuration]:
    """Yield every launch shape, with all options and without options."""
    f32 = torch.float32
    scalars = {"ignore_index": "i32", "label_smoothing": "fp32", "z_loss": "fp32", "softcap": "fp32"}
    sizes = {"logits_row": "i32", "N": "i32", "K": "i32", "V": "i32"}
    for full in (True, False):
        w = f32 if full else None
        weights = pointers(weight_ptr=w, weight_sum_ptr=w)
        common = {**pointers(logits_ptr=dtype, target_ptr=torch.int64), **weights, **sizes, **scalars}
        for block in powers_of_two(32, 4096):
            meta, warps = split_meta(rows_meta(block))
            flags = {"SMOOTH": full, "CAP": full, **meta}
            case, quick = f"K={block} {'full' if full else 'plain'}", quick_width(block)
            out = pointers(loss_ptr=f32, stats_ptr=f32)
            yield Configuration(cross_entropy_fwd_kernel, case, {**common, **out}, warps, flags, quick=quick)
            both = {**common, "scale_step": "i32"}
            out = pointers(dloss_ptr=f32, stats_ptr=f32, dlogits_ptr=dtype)
            yield Configuration(cross_entropy_bwd_kernel, case, {**both, **out}, warps, flags, quick=quick)
            out = pointers(loss_ptr=f32, scale_ptr=f32)
            yield Configuration(cross_entropy_fwd_bwd_kernel, case, {**both, **out}, warps, flags, quick=quick)
    yield from held_configurations(dtype)
    meta, warps = split_meta(scale_meta())
    types = {**pointers(x_ptr=dtype, scale_ptr=f32), "x_row": "i32", "scale_step": "i32", "N": "i32", "V": "i32"}
    yield Configuration(scale_rows_kernel, "any V", types, warps, meta)
