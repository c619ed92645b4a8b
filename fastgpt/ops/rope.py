"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    (a, b) -> (a cos - b sin, b cos + a sin)      inverted by -sin

for each pair of the first rotary_dim columns of a head: (i, i + rotary_dim/2) by default ("half", GPT-NeoX, Llama) or
(2i, 2i + 1) ("interleaved", GPT-J). cos and sin belong to the token's position; the other columns are unchanged.

One launch serves q and k, or all heads of a packed tensor in place. Each element is read and written once, forward and
backward. Backward writes a new tensor, because other code may hold the incoming gradient.

Saved for backward: cos, sin and positions only.

Determinism: bitwise. Each pair is computed independently.

Limits: cos and sin are constants and get no gradient. First derivatives only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt.core.backend import Cell, checks_values, register, select
from fastgpt.ops._common import (
    check_float,
    check_like,
    define,
    mark_mutated,
    needs_grad,
    no_outputs,
    relative_error,
)
from fastgpt.ops._rope_scaling import rope_frequencies as rope_frequencies


def _fwd_fake(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _copy_fake(qkv: Tensor, *args: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


_TABLES = "Tensor cos, Tensor sin, Tensor? positions"
ROPE_FWD = define(
    "rope",
    "rope_fwd",
    f"(Tensor q, Tensor k, {_TABLES}, bool interleaved, bool inverse) -> (Tensor, Tensor)",
    _fwd_fake,
)
ROPE_ROWS = define(  # rotates the first n_turned heads in place
    "rope",
    "rope_rows",
    f"(Tensor(a!) qkv, {_TABLES}, int n_turned, bool interleaved, bool inverse) -> ()",
    no_outputs,
)
ROPE_COPY = define(  # like rope_rows, into a new tensor
    "rope",
    "rope_copy",
    f"(Tensor qkv, {_TABLES}, int n_turned, bool interleaved, bool inverse) -> Tensor",
    _copy_fake,
)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool) -> Tensor:
    """Compute the formula at the head of this file, in fp32 (fp64 for fp64 input)."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].to(torch.promote_types(x.dtype, torch.float32)), x[..., 2 * half :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    rows = slice(x.shape[1]) if positions is None else positions
    c, s = (table[rows].to(turned.dtype).unsqueeze(-2) for table in (cos, sin))  # ((B,) T, 1, half)
    pair = (a * c - b * s, b * c + a * s)
    out = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((out.to(x.dtype), rest), -1)


def rope_ref(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Serve the `torch` backend, the parity baseline and, in fp64, the truth of parity.

    It is eager and computes in fp32 like the kernels. A composition that rounds to 16 bits between its steps would
    give a wider bound than this op needs.
    """
    return _rotate(q, cos, sin, positions, interleaved), _rotate(k, cos, sin, positions, interleaved)


def rope_qkv_ref(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    n_heads: int,
    n_kv_heads: int,
    interleaved: bool = False,
    positions: Tensor | None = None,
) -> Tensor:
    """Return a new tensor: rope_ref of one packed tensor."""
    n = n_heads + n_kv_heads
    return torch.cat((_rotate(qkv[:, :, :n], cos, sin, positions, interleaved), qkv[:, :, n:]), dim=2)


class RopeFn(torch.autograd.Function):
    """Autograd over the raw op: (backend, q, k, cos, sin, positions, interleaved) -> rotated (q, k)."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, pairs: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.backend, ctx.pairs = backend, pairs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin, positions)
        return ROPE_FWD[backend](q, k, cos, sin, positions, pairs, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
        dq, dk = (g if needed else None for g, needed in zip((dq, dk), ctx.needs_input_grad[1:3]))
        some = dk if dq is None else dq
        if some is None:
            return (None,) * 7
        nothing = some[:, :, :0]  # no heads: an unneeded gradient costs nothing
        turned = ROPE_FWD[ctx.backend](
            nothing if dq is None else dq, nothing if dk is None else dk, *ctx.saved_tensors, ctx.pairs, True
        )
        return None, None if dq is None else turned[0], None if dk is None else turned[1], None, None, None, None


class RopeQkvFn(torch.autograd.Function):
    """Autograd over the raw ops: (backend, x, shape, inplace, cos, sin, positions, n_turned, interleaved) -> rotated x.

    x is a packed (B, T, H, D) tensor, or a tensor of which the packed tensor is a view of this shape.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        shape: torch.Size | None,
        inplace: bool,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        *options: Any,
    ) -> Tensor:
        ctx.backend, ctx.shape, ctx.options = backend, shape, options
        ctx.save_for_backward(cos, sin, positions)
        if not inplace:
            return ROPE_COPY[backend](x, cos, sin, positions, *options, False)
        ctx.mark_dirty(x)
        ROPE_ROWS[backend](x if shape is None else x.view(shape), cos, sin, positions, *options, False)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        packed = dy if ctx.shape is None else dy.reshape(ctx.shape)
        dx = ROPE_COPY[ctx.backend](packed, *ctx.saved_tensors, *ctx.options, True)
        return None, dx if ctx.shape is None else dx.view(dy.shape), *(None,) * 7


def _writable(x: Tensor) -> bool:
    """Return whether columns are contiguous and no two elements share an address."""
    if torch.compiler.is_compiling() or x.is_contiguous():
        return x.is_contiguous()
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return False
    reach = 0  # of the inner dimensions
    for step, size in sorted(zip(x.stride(), x.shape)):
        if size > 1 and step <= reach:
            return False
        reach += step * (size - 1)
    return True


def _held_by(x: Tensor) -> Tensor | None:
    """Return the tensor of which x is a plain view that covers all of it (x itself if it is not a view), or None.

    The write is reported to autograd on that tensor. After a write to a view, backward copies the whole gradient three
    times. Compilers remove those copies, but cannot trace `_base`.
    """
    if torch.compiler.is_compiling() or x._base is None:
        return x
    base, node = x._base, x.grad_fn
    while node is not None and node is not base.grad_fn and node.name() == "ViewBackward0":
        node = node.next_functions[0][0]
    return base if node is not None and node is base.grad_fn and base.is_contiguous() else None


def _check(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    """Raise unless the tables and the positions fit x (B, T, H, D)."""
    b, t, d = x.shape[0], x.shape[1], x.shape[3]
    for name, table in (("cos", cos), ("sin", sin)):
        check_float("rope", name, table)
        if table.requires_grad:
            raise ValueError(f"rope: {name} requires grad, expected a constant table")
    if cos.dim() != 2 or cos.shape != sin.shape:
        raise ValueError(f"rope: cos {tuple(cos.shape)} and sin {tuple(sin.shape)}, expected both (T, rotary_dim / 2)")
    if 2 * cos.shape[1] > d:
        raise ValueError(f"rope: cos covers {2 * cos.shape[1]} columns, expected at most the head dimension {d}")
    dtypes = (torch.float32, torch.promote_types(x.dtype, torch.float32))
    for name, table in (("cos", cos), ("sin", sin)):
        check_like("rope", name, table, tuple(cos.shape), x, dtypes, "")
    if positions is None:
        if t > cos.shape[0]:
            raise ValueError(f"rope: x has {t} positions, cos and sin only {cos.shape[0]}")
        return
    if tuple(positions.shape) not in ((t,), (b, t)):
        raise ValueError(f"rope: positions has shape {tuple(positions.shape)}, expected ({t},) or ({b}, {t})")
    check_like("rope", "positions", positions, tuple(positions.shape), x, (torch.int64,), "")
    if checks_values(positions) and positions.numel():
        low, high = (int(v) for v in positions.aminmax())
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(f"rope: positions reach from {low} to {high}, expected 0 to {cos.shape[0] - 1}")


def _self_check(backend: str, device: torch.device) -> float:
    errors = [_error(backend, device, torch.float32, 20, 8)]
    if backend == "cuda":
        errors += [_error(backend, device, torch.bfloat16, 64, 32)]  # 16-byte accesses
    return max(errors)


def _error(backend: str, device: torch.device, dtype: torch.dtype, dim: int, half: int) -> float:
    q, k = (torch.randn(2, 5, n_heads, dim, device=device).to(dtype) for n_heads in (3, 2))
    cos, sin = torch.randn(2, 9, half, device=device).unbind()
    positions = torch.randint(9, (2, 5), device=device)
    got: list[Tensor] = []
    wanted: list[Tensor] = []
    for interleaved in (False, True):
        for inverse in (False, True):
            s = -sin if inverse else sin
            exact = rope_ref(q.double(), k.double(), cos, s, interleaved=interleaved, positions=positions)
            packed = torch.cat((q, k), 2)
            wanted += [*exact, torch.cat((exact[0], k.double()), 2), torch.cat(exact, 2)]
            got += ROPE_FWD[backend](q, k, cos, sin, positions, interleaved, inverse)
            got.append(ROPE_COPY[backend](packed, cos, sin, positions, 3, interleaved, inverse))
            ROPE_ROWS[backend](packed, cos, sin, positions, 5, interleaved, inverse)
            got.append(packed)
    return relative_error(got, wanted)


register("rope", _self_check, cuda=Cell(), triton=Cell(), cpu=Cell())


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys.

    Args:
        q: (B, T, H, D), any strides; fp32, bf16, fp16 (fp64 on the reference).
        k: (B, T, Hkv, D) in q's dtype, any strides.
        cos, sin: (T_max, rotary_dim / 2), fp32, of position times frequency in radians; constants.
        interleaved: pairs (2i, 2i + 1) instead of (i, i + rotary_dim / 2).
        positions: (T,) or (B, T) int64 row of cos and sin for each token; default 0, 1, 2, ...

    Returns:
        q and k rotated, in their dtypes, contiguous; computed in fp32.

    Raises:
        ValueError, TypeError: with the argument, the value received and the value expected. On a CPU that includes
            positions out of range. On a GPU the rotated columns of such a token are NaN; with FASTGPT_CHECK=1 the call
            waits for the device and raises.

    Example:
        >>> import torch
        >>> from fastgpt import ops
        >>> from fastgpt.ops.rope import rope_frequencies
        >>> angles = torch.outer(torch.arange(16.0), rope_frequencies(8).float())
        >>> q, k = ops.rope(torch.randn(2, 16, 4, 8), torch.randn(2, 16, 2, 8), angles.cos(), angles.sin())
        >>> q.shape, k.shape
        (torch.Size([2, 16, 4, 8]), torch.Size([2, 16, 2, 8]))

    Source: Su et al. 2021 (arXiv:2104.09864).
    """
    check_float("rope", "q", q)
    check_float("rope", "k", k)
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"rope: q {tuple(q.shape)} and k {tuple(k.shape)}, expected (B, T, H, D) and (B, T, Hkv, D)")
    check_like("rope", "k", k, tuple(k.shape), q, (q.dtype,), "")
    _check(q, cos, sin, positions)
    backend = select("rope", q)
    if backend == "torch":
        return rope_ref(q, k, cos, sin, interleaved=interleaved, positions=positions)
    if needs_grad(q, k):
        turned: tuple[Tensor, Tensor] = RopeFn.apply(backend, q, k, cos, sin, positions, interleaved)
        return turned
    return ROPE_FWD[backend](q, k, cos, sin, positions, interleaved, False)


def rope_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    n_heads: int,
    n_kv_heads: int,
    interleaved: bool = False,
    positions: Tensor | None = None,
) -> Tensor:
    """Rotate the query and key heads of one packed tensor: in place on kernels, into a new tensor on the reference.

    Args:
        qkv: (B, T, n_heads + 2 n_kv_heads, D): query heads, key heads, value heads; any strides. It is overwritten if
            its columns are contiguous, no element appears twice and, with gradients on, it is a whole tensor and not a
            part of one; else it is left unchanged. Use the returned tensor.
        cos, sin, interleaved, positions: as in `rope`.
        n_heads: query heads.
        n_kv_heads: key heads, and as many value heads.

    Returns:
        qkv with its first n_heads + n_kv_heads heads rotated.

    Raises:
        ValueError, TypeError: as in `rope`, and on kernels for a leaf that requires grad.

    Example:
        >>> import torch
        >>> from fastgpt import ops
        >>> from fastgpt.ops.rope import rope_frequencies
        >>> angles = torch.outer(torch.arange(16.0), rope_frequencies(8).float())
        >>> qkv = ops.rope_qkv(torch.randn(2, 16, 8, 8), angles.cos(), angles.sin(), n_heads=4, n_kv_heads=2)
        >>> qkv.shape
        torch.Size([2, 16, 8, 8])

    Source: Su et al. 2021 (arXiv:2104.09864).
    """
    check_float("rope", "qkv", qkv)
    heads, n_turned = n_heads + 2 * n_kv_heads, n_heads + n_kv_heads
    if qkv.dim() != 4 or qkv.shape[2] != heads:
        raise ValueError(f"rope: qkv has shape {tuple(qkv.shape)}, expected (B, T, {heads}, D)")
    _check(qkv, cos, sin, positions)
    backend = select("rope", qkv)
    if backend == "torch":
        names = dict(n_heads=n_heads, n_kv_heads=n_kv_heads)
        return rope_qkv_ref(qkv, cos, sin, interleaved=interleaved, positions=positions, **names)
    if needs_grad(qkv) and not torch.compiler.is_compiling() and qkv.is_leaf:
        raise ValueError("rope: qkv is a leaf that requires grad and would be overwritten; pass an op's output")
    options = (cos, sin, positions, n_turned, interleaved)
    writable = _writable(qkv)
    if not needs_grad(qkv):
        if not writable:
            return ROPE_COPY[backend](qkv, *options, False)
        ROPE_ROWS[backend](qkv, *options, False)
        mark_mutated([qkv])
        return qkv
    held = _held_by(qkv) if writable else None
    shape = None if held is None or held is qkv else qkv.shape
    out: Tensor = RopeQkvFn.apply(backend, qkv if held is None else held, shape, held is not None, *options)
    return out if shape is None else out.view(shape)
