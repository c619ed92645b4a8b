"""Linear layers over a frozen weight, with a low-rank adapter (LoRA) or without.

    y = x W^T + b + s D(x) A^T B^T,  D dropout
    dx = dy W + D'(s dy B A),  dA = (s dy B)^T D(x),  dB = dy^T (s D(x) A^T);  none for W

The output columns of a packed projection (queries, keys, values; gate, up) form segments, each with an A and a B of
its own, as if the projections were separate layers. The A's are one matrix, so the input is read once for all of
them; each B adds to its columns of the product in place. The segments share the dropout mask.

Saved for backward: x, which the layers around it keep as well, D(x) A^T (N, r), and with dropout a mask of one byte
per element. The adapter's parameters are fp32 over a 16-bit weight, and are multiplied in the dtype of x.

Source: Hu et al. 2021 (arXiv:2106.09685); rsLoRA: Kalajdzievski 2023 (arXiv:2312.03732).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops

Columns = tuple[int, int]  # first and last + 1 of a segment's output columns


class Store(Protocol):
    """A frozen weight in another form than a tensor: a module of buffers."""

    shape: tuple[int, int]  # (F, C)
    dtype: torch.dtype  # of the weight that was stored

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, (F, C)."""
        ...


Weight = Tensor | Store


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.dense(dtype)


def lora_scale(rank: int, alpha: float, rslora: bool) -> float:
    """Return s: alpha / r, or alpha / sqrt(r) with rsLoRA."""
    return alpha / (math.sqrt(rank) if rslora else rank)


class _Call:
    """What a call of the Function needs beside tensors that have gradients."""

    def __init__(self, weight: Weight, columns: Sequence[Columns], scale: float, dropout: float) -> None:
        self.weight, self.columns, self.scale, self.dropout = weight, columns, scale, dropout


class LoraFn(torch.autograd.Function):
    """Autograd of a layer with an adapter: (x (..., C), bias (F,), A (S r, C), B (sum of columns, r)) -> (..., F)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, call: _Call) -> Tensor:
        y = F.linear(x, dense(call.weight, x.dtype), bias)
        dropped, mask = x, None
        if call.dropout > 0:
            dropped, mask = torch.native_dropout(x, call.dropout, True)
        h = (dropped.reshape(-1, x.shape[-1]) @ a.to(x.dtype).t()).mul_(call.scale)  # (N, S r)
        _add_segments(y.view(-1, y.shape[-1]), h, b.to(x.dtype), call.columns)
        ctx.call, ctx.has_bias = call, bias is not None
        ctx.save_for_backward(x, mask, h, a, b)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, h, a, b = ctx.saved_tensors
        call, rows = ctx.call, dy.reshape(-1, dy.shape[-1])
        keep = 1 / (1 - call.dropout) if call.dropout < 1 else 0.0
        dh, db = _segment_gradients(rows, h, b.to(x.dtype), call.columns)
        dh.mul_(call.scale)
        dropped = x if mask is None else torch.ops.aten.native_dropout_backward(x, mask, keep)
        da = dh.t() @ dropped.reshape(-1, x.shape[-1])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = rows @ dense(call.weight, x.dtype)
            if mask is None:
                torch.addmm(dx, dh, a.to(x.dtype), out=dx)
            else:
                dx += torch.ops.aten.native_dropout_backward(dh @ a.to(x.dtype), mask.reshape(dx.shape), keep)
            dx = dx.view(x.shape)
        dbias = rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[1] else None
        return dx, dbias, da.to(a.dtype), db.to(b.dtype), None


def _add_segments(y: Tensor, h: Tensor, b: Tensor, columns: Sequence[Columns]) -> None:
    """Add h_i B_i^T to the columns of each segment of y (N, F)."""
    r, row = b.shape[1], 0
    for i, (start, end) in enumerate(columns):
        part = y[:, start:end]
        torch.addmm(part, h[:, i * r : (i + 1) * r], b[row : row + end - start].t(), out=part)
        row += end - start


def _segment_gradients(dy: Tensor, h: Tensor, b: Tensor, columns: Sequence[Columns]) -> tuple[Tensor, Tensor]:
    """Return (dy_i B_i of each segment side by side (N, S r), dB)."""
    r, row = b.shape[1], 0
    dh, db = torch.empty_like(h), torch.empty_like(b)
    for i, (start, end) in enumerate(columns):
        part, rank = dy[:, start:end], slice(i * r, (i + 1) * r)
        rows = slice(row, row + end - start)
        torch.mm(part, b[rows], out=dh[:, rank])
        torch.mm(part.t(), h[:, rank], out=db[rows])
        row += end - start
    return dh, db


class FrozenFn(torch.autograd.Function):
    """Autograd of a layer over a store, (x, bias) -> y; saves nothing but the store."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, store: Store) -> Tensor:
        ctx.store, ctx.has_bias = store, bias is not None
        return F.linear(x, store.dense(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = dy @ ctx.store.dense(dy.dtype) if ctx.needs_input_grad[0] else None
        bias = ctx.has_bias and ctx.needs_input_grad[1]
        return dx, dy.reshape(-1, dy.shape[-1]).sum(0) if bias else None, None


class FrozenLinear(nn.Module):
    """Linear layer over a weight in a store, through which gradients flow to the input and the bias.

    Args:
        store: the weight (F, C).
        bias: (F,), or None.

    Shape: input (..., C) -> (..., F).
    """

    def __init__(self, store: Any, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.store, self.bias = store, bias

    @property
    def out_features(self) -> int:
        return int(self.store.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.store.shape[1])

    def product(self, input: Tensor) -> Tensor:
        """Return the product without the bias."""
        y: Tensor = FrozenFn.apply(input, None, self.store)
        return y

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = FrozenFn.apply(input, self.bias, self.store)
        return y


class LoraLinear(nn.Module):
    """Linear layer with a frozen weight and a low-rank adapter for some or all of its output columns.

    Args:
        base: an nn.Linear or a FrozenLinear, whose weight and bias this layer takes over and freezes.
        columns: (first, last + 1) output columns of each segment, ascending; default: one of all columns.
        rank: r, of every segment.
        alpha, rslora: as in `lora_scale`.
        dropout: of the adapter's input, while training.

    Attributes:
        lora_A: (S r, C), of the S segments; initialised uniformly in +-1 / sqrt(C), as by PEFT.
        lora_B: (columns of all segments, r); initialised to 0.
        merged: W + s B A in the dtype of W after `merge`, else None; the weight is never written to.
        enabled: False leaves the adapter out.

    Shape: input (..., C) -> (..., F).
    """

    merged: Tensor | None
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        base: nn.Linear | FrozenLinear,
        rank: int,
        alpha: float,
        *,
        columns: Sequence[Columns] | None = None,
        rslora: bool = False,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.alpha, self.rslora, self.dropout = rank, alpha, rslora, dropout
        self.columns = [(0, self.out_features)] if columns is None else list(columns)
        self.store = base.store if isinstance(base, FrozenLinear) else None
        self.weight = base.weight if isinstance(base, nn.Linear) else None  # type: ignore[assignment]
        self.bias = base.bias  # type: ignore[assignment]
        for p in self.parameters():
            p.requires_grad_(False)
        like = base.weight if isinstance(base, nn.Linear) else next(base.buffers())
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        bound, rows = 1 / math.sqrt(self.in_features), sum(end - start for start, end in self.columns)
        a = torch.empty(
            len(self.columns) * rank, self.in_features, dtype=dtype, device="meta" if like.is_meta else "cpu"
        )
        self.lora_A = nn.Parameter(a if a.is_meta else a.uniform_(-bound, bound, generator=generator).to(like.device))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank, dtype=dtype, device=like.device))
        self.register_buffer("merged", None, persistent=False)
        self.enabled = True
        self.train(base.training)

    @property
    def scale(self) -> float:
        """The s of the formula."""
        return lora_scale(self.rank, self.alpha, self.rslora)

    @property
    def base_weight(self) -> Weight:
        return self.store if self.weight is None else self.weight  # type: ignore[return-value]

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return s B A (F, C) in the dtype of the adapter; rows without an adapter are 0."""
        out = self.lora_A.new_zeros(self.out_features, self.in_features)
        row = 0
        for i, (start, end) in enumerate(self.columns):
            a = self.lora_A[i * self.rank : (i + 1) * self.rank]
            torch.mm(self.lora_B[row : row + end - start], a, out=out[start:end])
            row += end - start
        return out.mul_(self.scale)

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W + s B A (F, C), summed in the dtype of the adapter; dtype is by default that of W."""
        weight = dense(self.base_weight, self.lora_A.dtype)
        return self.delta().add_(weight).to(dtype or self.base_weight.dtype)

    def merge(self) -> None:
        """Use W + s B A from here on, a copy of the weight, so that a call is one product."""
        self.merged = self.merged_weight()

    def unmerge(self) -> None:
        """Use W and the adapter again, and free the copy."""
        self.merged = None

    def product(self, input: Tensor) -> Tensor:
        """Return the product without the bias."""
        return self._product(input, None)

    def forward(self, input: Tensor) -> Tensor:
        return self._product(input, self.bias)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.merged is not None and self.enabled:
            if self.training and torch.is_grad_enabled():
                raise ValueError("LoraLinear: the adapter is merged, expected unmerge() before training goes on")
            return ops.linear(x, self.merged.to(x.dtype), bias)
        if not self.enabled:
            y: Tensor = FrozenFn.apply(x, bias, self.store) if self.weight is None else ops.linear(x, self.weight, bias)
            return y
        dropout = self.dropout if self.training else 0.0
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            return lora_linear_ref(
                x, self.base_weight, bias, self.lora_A, self.lora_B, self.columns, self.scale, dropout
            )
        call = _Call(self.base_weight, self.columns, self.scale, dropout)
        if torch.is_grad_enabled() or self.weight is None:
            y = LoraFn.apply(x, bias, self.lora_A, self.lora_B, call)
            return y
        y = ops.linear(x, self.weight, bias)  # has a kernel for few rows
        h = (F.dropout(x, dropout) if dropout > 0 else x).reshape(-1, x.shape[-1]) @ self.lora_A.to(x.dtype).t()
        _add_segments(y.view(-1, y.shape[-1]), h.mul_(self.scale), self.lora_B.to(x.dtype), self.columns)
        return y

    def extra_repr(self) -> str:
        names = ("in_features", "out_features", "rank", "alpha", "rslora", "dropout", "columns")
        return ", ".join(f"{n}={getattr(self, n)!r}" for n in names)


def lora_linear_ref(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    columns: Sequence[Columns],
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Compute the formula at the head of this file in PyTorch's ops; torch.compile and autocast get this."""
    y = F.linear(x, dense(weight, x.dtype), bias)
    h = F.linear(F.dropout(x, dropout) if dropout > 0 else x, a.to(x.dtype)) * scale
    r, row, end, parts = b.shape[1], 0, 0, []
    for i, (start, stop) in enumerate(columns):
        parts.append(y[..., end:start])
        rows = b[row : row + stop - start].to(x.dtype)
        parts.append(y[..., start:stop] + F.linear(h[..., i * r : (i + 1) * r], rows))
        row, end = row + stop - start, stop
    return torch.cat([*parts, y[..., end:]], dim=-1)
