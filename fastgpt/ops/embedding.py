"""Token embedding plus learned position rows.

    y[n] = weight[ids[n]] + position_weight[positions[n]]
    dweight[v] = sum of dy[n] over ids[n] = v,  dposition_weight[p] = sum of dy[n] over positions[n] = p

Forward reads both rows and writes their sum once. Backward sorts the tokens by table row and sums the gradients of each
row in fp32, in the order of the tokens. If a weight has a `grad_buffer` (fastgpt.nn.keep_gradients), the rows are added
to it, so a head that shares the weight needs no second table.

Saved for backward: ids and positions only.

Determinism: bitwise. The order of each sum is fixed, without atomics.

Limits: dense gradients only; no max_norm, scale_grad_by_freq or sparse. First derivatives only.
"""

from __future__ import annotations

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
    gradient_place,
    mark_mutated,
    needs_grad,
    no_outputs,
    relative_error,
)


def _fwd_fake(ids: Tensor, weight: Tensor, position_weight: Tensor | None, positions: Tensor | None) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]))


def _bwd_fake(dy: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    return dy.new_empty((num_rows, dy.shape[-1]))


EMBEDDING_FWD = define(
    "embedding",
    "embedding_fwd",
    "(Tensor ids, Tensor weight, Tensor? position_weight, Tensor? positions) -> Tensor",
    _fwd_fake,
)
EMBEDDING_BWD = define("embedding", "embedding_bwd", "(Tensor dy, Tensor ids, int num_rows) -> Tensor", _bwd_fake)
EMBEDDING_BWD_ADD = define(
    "embedding", "embedding_bwd_add", "(Tensor(a!) dweight, Tensor dy, Tensor ids) -> ()", no_outputs
)


def embedding_ref(
    ids: Tensor,
    weight: Tensor,
    position_weight: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """Serve the `torch` backend, the parity baseline and, in fp64, the truth of parity: F.embedding, twice."""
    out = F.embedding(ids, weight, padding_idx)
    if position_weight is None:
        return out
    if positions is None:
        return out + position_weight[: ids.shape[-1]]
    return out + F.embedding(positions, position_weight)


class EmbeddingFn(torch.autograd.Function):
    """Autograd over the raw ops: (backend, ids, weight, position_weight, positions, padding_idx) -> y."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        ids: Tensor,
        weight: Tensor,
        position_weight: Tensor | None,
        positions: Tensor | None,
        padding_idx: int | None,
    ) -> Tensor:
        ctx.backend, ctx.rows, ctx.padding_idx = backend, weight.shape[0], padding_idx
        ctx.position_rows = 0 if position_weight is None else position_weight.shape[0]
        # Not saved tensors: their values are not needed, and an optimizer may change them before backward.
        ctx.tables = (None, None) if torch.compiler.is_compiling() else (weight, position_weight)
        ctx.save_for_backward(ids, positions)
        return EMBEDDING_FWD[backend](ids, weight, position_weight, positions)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ids, positions = ctx.saved_tensors
        dweight = dposition = None
        if ctx.needs_input_grad[2]:
            counted = ids if ctx.padding_idx is None else torch.where(ids == ctx.padding_idx, -1, ids)  # -1: no row
            dweight = _gather(ctx.backend, ctx.tables[0], ctx.rows, dy, counted)
        if ctx.needs_input_grad[3] and positions is None:
            dposition = _sum_batch(ctx.tables[1], ctx.position_rows, dy)
        elif ctx.needs_input_grad[3]:
            where = positions.expand(ids.shape)
            dposition = _gather(ctx.backend, ctx.tables[1], ctx.position_rows, dy, where)
        return None, None, dweight, dposition, None, None


def _place(table: Tensor | None) -> Tensor | None:
    """Return the buffer for the gradient of this table, zeroed if it holds no sum yet; None if there is no buffer."""
    buffer, filled = (None, False) if table is None else gradient_place(table)
    if table is not None and buffer is not None:
        if not filled:
            buffer.zero_()
        table.grad = buffer
    return buffer


def _gather(backend: str, table: Tensor | None, rows: int, dy: Tensor, ids: Tensor) -> Tensor | None:
    """Return the gradient of a table whose rows `ids` were read; None if it was written to its buffer."""
    buffer = _place(table)
    if buffer is None:
        grad: Tensor = EMBEDDING_BWD[backend](dy, ids, rows)
        return grad
    EMBEDDING_BWD_ADD[backend](buffer, dy, ids)
    mark_mutated([buffer])
    return None


def _sum_batch(table: Tensor | None, rows: int, dy: Tensor) -> Tensor | None:
    """Return the same as _gather if token t of every sequence read row t."""
    total = (dy if dy.dim() > 2 else dy[None]).flatten(0, -3).sum(0, dtype=torch.float32)  # (T, C)
    buffer = _place(table)
    if buffer is None:
        narrow = total.to(dy.dtype)
        return narrow if rows == total.shape[0] else F.pad(narrow, (0, 0, 0, rows - total.shape[0]))
    buffer[: total.shape[0]] += total
    return None


def _check_ids(name: str, ids: object, rows: int, weight: Tensor) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"embedding: {name} is {getattr(ids, 'dtype', repr(ids))}, expected torch.int64 or torch.int32")
    if ids.device != weight.device:
        raise ValueError(f"embedding: {name} is on {ids.device}, expected {weight.device}")
    if checks_values(ids) and ids.numel():
        low, high = (int(v) for v in ids.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(f"embedding: {name} reach from {low} to {high}, expected 0 to {rows - 1}")


def _check(ids: Tensor, weight: Tensor, position_weight: Tensor | None, positions: Tensor | None) -> None:
    check_float("embedding", "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"embedding: weight has shape {tuple(weight.shape)}, expected (V, C)")
    _check_ids("ids", ids, weight.shape[0], weight)
    if position_weight is None:
        return
    check_float("embedding", "position_weight", position_weight)
    if position_weight.dim() != 2 or position_weight.shape[1] != weight.shape[1]:
        got = tuple(position_weight.shape)
        raise ValueError(f"embedding: position_weight has shape {got}, expected (T_max, {weight.shape[1]})")
    check_like(
        "embedding", "position_weight", position_weight, tuple(position_weight.shape), weight, (weight.dtype,), ""
    )
    if ids.dim() == 0:
        raise ValueError("embedding: ids has shape (), expected (..., T) with position_weight")
    t = ids.shape[-1]
    if positions is None:
        if t > position_weight.shape[0]:
            raise ValueError(f"embedding: ids have {t} positions, position_weight only {position_weight.shape[0]} rows")
        return
    _check_ids("positions", positions, position_weight.shape[0], weight)
    if tuple(positions.shape) not in ((t,), tuple(ids.shape)):
        raise ValueError(
            f"embedding: positions has shape {tuple(positions.shape)}, expected ({t},) or ids' {tuple(ids.shape)}"
        )


def _self_check(backend: str, device: torch.device) -> float:
    errors = [_error(backend, device, torch.float32, 5, 130)]
    if backend == "cuda":  # other kernels: 16-byte accesses, and sums in more than one level
        errors.append(_error(backend, device, torch.bfloat16, 40, 768))
    return max(errors)


def _error(backend: str, device: torch.device, dtype: torch.dtype, n_time: int, n_cols: int) -> float:
    weight, position_weight = (torch.randn(n, n_cols, device=device).to(dtype) for n in (11, n_time + 2))
    ids, positions = (torch.randint(n, (4, n_time), device=device) for n in (11, n_time + 2))
    dy = torch.randn(4, n_time, n_cols, device=device).to(dtype)
    exact, *grads = fp64_results(
        lambda *tables: embedding_ref(ids, *tables, positions=positions), (weight, position_weight), (dy,)
    )
    others = ((None, None), (position_weight, None))
    got = [EMBEDDING_FWD[backend](ids, weight, *o) for o in ((position_weight, positions), *others)]
    dweight = EMBEDDING_BWD[backend](dy, ids, 11)
    twice = dweight.clone()
    EMBEDDING_BWD_ADD[backend](twice, dy, ids)
    got += [dweight, twice, EMBEDDING_BWD[backend](dy, positions, n_time + 2)]
    table, rows = weight.double()[ids], position_weight.double()
    return relative_error(got, [exact, table, table + rows[:n_time], grads[0], 2 * grads[0], grads[1]])


register("embedding", _self_check, cuda=Cell(), triton=Cell(), cpu=Cell())


def embedding(
    ids: Tensor,
    weight: Tensor,
    position_weight: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """Return weight[ids], plus position_weight[positions] if given.

    Args:
        ids: (..., T) int64 or int32, usually (B, T).
        weight: (V, C) fp32, bf16, fp16 (fp64 on the reference).
        position_weight: (T_max, C) in weight's dtype, or None.
        positions: (T,) or ids' shape, int64 or int32; default 0, 1, 2, ... along T; ignored without position_weight.
        padding_idx: a row of weight that gets no gradient, -V to V - 1.

    Returns:
        (..., T, C) in weight's dtype, summed in fp32. Gradients are dense, in weight's dtype, summed in fp32.

    Raises:
        ValueError, TypeError: with the argument, the value received and the value expected. On a CPU that includes ids
            and positions out of range. On a GPU the row of such a token is NaN and adds nothing to a gradient; with
            FASTGPT_CHECK=1 the call waits for the device and raises.

    Example:
        >>> import torch
        >>> from fastgpt import ops
        >>> ids = torch.randint(100, (2, 16))
        >>> ops.embedding(ids, torch.randn(100, 32), torch.randn(16, 32)).shape
        torch.Size([2, 16, 32])
    """
    _check(ids, weight, position_weight, positions)
    if padding_idx is not None:
        v = weight.shape[0]
        if not -v <= padding_idx < v:
            raise ValueError(f"embedding: padding_idx is {padding_idx}, expected {-v} to {v - 1}")
        padding_idx %= v
    backend = select("embedding", weight)
    positions = None if position_weight is None else positions
    if backend == "torch":
        return embedding_ref(ids, weight, position_weight, positions=positions, padding_idx=padding_idx)
    if needs_grad(weight, position_weight):
        y: Tensor = EmbeddingFn.apply(backend, ids, weight, position_weight, positions, padding_idx)
    else:
        y = EMBEDDING_FWD[backend](ids, weight, position_weight, positions)
    return y
