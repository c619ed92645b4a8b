"""The shared parts of the Triton kernels of LayerNorm and RMSNorm: residual add, parameter gradients, launchers.

A row stays in registers while it fits (forward C <= 16384, backward C <= 8192). Wider rows are read in column blocks,
once from memory and again from L2. dweight, dbias and dx_bias, the sum of dx over the rows, are sums of partials
(_partials.py), so results are bitwise deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._partials import add_partials, add_partials_configuration
from ._runtime import (
    Configuration,
    as_rows,
    cast,
    ceil_pow2,
    interpreted,
    jit_kernel,
    on_device,
    pointers,
    powers_of_two,
    processors,
    quick_width,
    split_meta,
)

MAX_COLUMNS = 65536
FWD_ONE_PIECE = 16384  # wider rows spill where pointers or strides are not 16-byte aligned (112 to 320 bytes at 32768)
BWD_ONE_PIECE = 8192  # wider rows spill (256 bytes at 16384)

Meta = dict[str, int]
Types = dict[str, Any]  # arguments of kernels: types in a signature, or values of constexprs


@dataclass(frozen=True)
class Norm:
    """The kernels of one norm and the parameters in which the two norms differ.

    Attributes:
        fwd, fwd_wide: kernels of (x, residual, x_bias, parameters, y, sum, statistics, x_row, residual_row, N, C,
            scalars).
        bwd, dx_wide: kernels of (dy, dsum, h, weight, statistics, dx, partials (bwd only), dy_row, dsum_row, h_row, N,
            C, scalars, X_BIAS (bwd only)).
        mean: whether the norm has a mean and a bias. If so, the statistics are mean and rstd (2, N), and the partials
            are dweight and dbias. Otherwise the statistics are rstd (N), and the partials are dweight. With x_bias, its
            gradient is the last of the partials.
        fwd_elements: largest number of elements per program of `fwd`.
        wide_warps: warps per program of `fwd_wide` and `dx_wide`.
    """

    fwd: Any
    fwd_wide: Any
    bwd: Any
    dx_wide: Any
    mean: bool
    fwd_elements: int
    wide_warps: int

    def forward(self, C: int) -> tuple[Any, Meta]:
        """Return the forward kernel for C columns and its launch shape."""
        meta = self._meta(C, FWD_ONE_PIECE, rows=16, elements=self.fwd_elements, warps=8)
        return self.fwd if "ROWS" in meta else self.fwd_wide, meta

    def backward(self, C: int, x_bias: bool) -> tuple[Any, Meta]:
        """Return the kernel of dx for C columns and its launch shape; if the shape has ROWS, it writes partials."""
        one_piece = BWD_ONE_PIECE // 2 if self.mean and x_bias else BWD_ONE_PIECE
        meta = self._meta(C, one_piece, rows=4, elements=1024, warps=16)
        return self.bwd if "ROWS" in meta else self.dx_wide, meta

    def _meta(self, C: int, one_piece: int, rows: int, elements: int, warps: int) -> Meta:
        """Allow `rows` rows and `elements` elements a program (interpreter: more); above `one_piece`, column blocks."""
        block = ceil_pow2(C)
        if block > one_piece:
            return {"BLOCK": 4096, "num_warps": self.wide_warps}
        if interpreted():
            rows, elements = 64, 65536
        rows = max(1, min(rows, elements // block))
        return {"ROWS": rows, "BLOCK": block, "num_warps": max(4, min(warps, 4 * rows * block // elements))}


@triton.jit
def load_sum(x_ptr, residual_ptr, x_bias_ptr, sum_ptr, row, x_row, residual_row, C, c, mask):
    """Load one tile of h in fp32: x, or x + x_bias + residual rounded to x's dtype; store the sum unless sum_ptr is
    None."""
    h = tl.load(x_ptr + row * x_row + c, mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        if x_bias_ptr is not None:
            h += tl.load(x_bias_ptr + c, c < C, other=0.0).to(tl.float32)
        h += tl.load(residual_ptr + row * residual_row + c, mask, other=0.0).to(tl.float32)
        h = cast(h, x_ptr.dtype.element_ty).to(tl.float32)
        if sum_ptr is not None:
            tl.store(sum_ptr + row * C + c, cast(h, sum_ptr.dtype.element_ty), mask)
    return h


@triton.jit
def store_dx(dx, dx_ptr, dsum_ptr, row, dsum_row, C, c, mask):
    """Store one tile of dx, plus dsum unless dsum_ptr is None; return it in fp32."""
    if dsum_ptr is not None:
        dx += tl.load(dsum_ptr + row * dsum_row + c, mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * C + c, cast(dx, dx_ptr.dtype.element_ty), mask)
    return dx


@jit_kernel(do_not_specialize=["N"])
def norm_partials_wide_kernel(
    dy_ptr,  # (N, C), rows dy_row apart
    h_ptr,  # (N, C), rows h_row apart
    stats_ptr,  # MEAN: (2, N), mean and rstd; otherwise (N), rstd
    dx_ptr,  # (N, C) contiguous, or None
    partials_ptr,  # (programs along axis 1, sums, C): dweight, with MEAN dbias, with dx_ptr dx_bias
    dy_row, h_row, N, C, MEAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of BLOCK columns over row tiles p, p + programs, ...; p is the program along axis 1."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    dx_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(N, ROWS), tl.num_programs(1)):
        row = (tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)  # (ROWS, 1)
        mask = (row < N) & (c < C)
        dy = tl.load(dy_ptr + row * dy_row + c, mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + row * h_row + c, mask, other=0.0).to(tl.float32)
        if MEAN:
            h -= tl.load(stats_ptr + row, row < N, other=0.0)
            rstd = tl.load(stats_ptr + N + row, row < N, other=0.0)
            dbias += dy
        else:
            rstd = tl.load(stats_ptr + row, row < N, other=0.0)
        dweight += dy * (h * rstd)
        if dx_ptr is not None:
            dx_bias += tl.load(dx_ptr + row * C + c, mask, other=0.0).to(tl.float32)
    own: tl.constexpr = 2 if MEAN else 1
    sums: tl.constexpr = own if dx_ptr is None else own + 1
    out = partials_ptr + tl.program_id(1).to(tl.int64) * sums * C + c
    tl.store(out, tl.sum(dweight, axis=0, keep_dims=True), c < C)
    if MEAN:
        tl.store(out + C, tl.sum(dbias, axis=0, keep_dims=True), c < C)
    if dx_ptr is not None:
        tl.store(out + own * C, tl.sum(dx_bias, axis=0, keep_dims=True), c < C)


def programs_of(meta: Meta) -> int:
    """Return the programs of a backward kernel with ROWS that a multiprocessor has at a time, by their registers."""
    if interpreted():
        return 2
    threads = 32 * meta["num_warps"]
    elements = max(1, meta["ROWS"] * meta["BLOCK"] // threads)  # of a thread
    registers = 96 if meta["ROWS"] == 1 else 32 + 12 * elements  # as compiled; `make triton-check` refuses too many
    return max(1, min(12, 65536 // (registers * threads)))


def partials_meta() -> Meta:
    """Return the launch shape of the parameter gradients of wide rows."""
    return {"ROWS": 16, "BLOCK": 8192 if interpreted() else 128, "num_warps": 4}


def forward(
    norm: Norm,
    x: Tensor,
    residual: Tensor | None,
    x_bias: Tensor | None,
    parameters: tuple[Tensor | None, ...],
    stats: Tensor,
    *scalars: float,
) -> tuple[Tensor, Tensor | None]:
    """Fill the statistics; return y, and x + x_bias + residual (None without a residual)."""
    h = as_rows(x)  # (N, C)
    r = None if residual is None else as_rows(residual)
    parameters = tuple(None if t is None else t.contiguous() for t in (x_bias, *parameters))
    N, C = h.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if r is None else torch.empty_like(y)
    if y.numel():
        kernel, meta = norm.forward(C)
        r_row = 0 if r is None else r.stride(0)
        with on_device(x):
            grid = (triton.cdiv(N, meta.get("ROWS", 1)),)
            kernel[grid](h, r, *parameters, y, total, stats, h.stride(0), r_row, N, C, *scalars, **meta)
    return y, total


def backward(
    norm: Norm, dy: Tensor, dsum: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor,
    x_bias: Tensor | None, *scalars: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return dx, which is also the gradient of the residual, dweight, dbias and dx_bias (None if the parameter is
    None)."""
    weight = None if weight is None else weight.contiguous()
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    new = torch.empty if dx.numel() else torch.zeros
    dweight, dbias, dx_bias = (
        None if t is None else new(t.shape, dtype=t.dtype, device=t.device) for t in (weight, bias, x_bias)
    )
    if dx.numel() == 0:
        return dx, dweight, dbias, dx_bias
    dy, h = as_rows(dy), as_rows(h)  # (N, C)
    dsum = None if dsum is None else as_rows(dsum)
    with on_device(h):
        parameters = any(t is not None for t in (weight, bias, x_bias))
        partials = _launch_backward(norm, dy, dsum, h, weight, stats, dx, parameters, x_bias is not None, scalars)
        if partials is not None:
            add_partials(partials, dweight, *((dbias,) if norm.mean else ()), dx_bias)
    return dx, dweight, dbias, dx_bias


def _launch_backward(
    norm: Norm, dy: Tensor, dsum: Tensor | None, h: Tensor, weight: Tensor | None, stats: Tensor, dx: Tensor,
    parameters: bool, x_bias: bool, scalars: tuple[float, ...],
) -> Tensor | None:  # fmt: skip
    """Fill dx; return the partials of each program (programs, sums, C), or None without parameters."""
    N, C = h.shape
    sums = norm.mean + 1 + x_bias
    kernel, meta = norm.backward(C, x_bias)
    dy_row, dsum_row, h_row = dy.stride(0), 0 if dsum is None else dsum.stride(0), h.stride(0)
    if "ROWS" in meta:
        programs = min(triton.cdiv(N, meta["ROWS"]), programs_of(meta) * processors(h.device))
        partials = h.new_empty((programs, sums, C), dtype=torch.float32) if parameters else None
        args = (dy, dsum, h, weight, stats, dx, partials, dy_row, dsum_row, h_row, N, C, *scalars)
        kernel[(programs,)](*args, X_BIAS=x_bias, **meta)
        return partials
    kernel[(N,)](dy, dsum, h, weight, stats, dx, dy_row, dsum_row, h_row, N, C, *scalars, **meta)
    if not parameters:
        return None
    wide = partials_meta()
    blocks = triton.cdiv(C, wide["BLOCK"])
    programs = min(triton.cdiv(N, wide["ROWS"]), max(1, 8 * processors(h.device) // blocks))
    partials = h.new_empty((programs, sums, C), dtype=torch.float32)
    args = (dy, h, stats, dx if x_bias else None, partials, dy_row, h_row, N, C)
    norm_partials_wide_kernel[(blocks, programs)](*args, MEAN=norm.mean, **wide)
    return partials


def configurations(norm: Norm, dtype: torch.dtype, weight_dtype: torch.dtype | None) -> Iterator[Configuration]:
    """Yield every launch shape with all options, which needs most registers, and without options."""
    w = weight_dtype or dtype
    for full in (True, False):
        types = _types(dtype, w, full) | {"X_BIAS": full}
        for block in powers_of_two(16, MAX_COLUMNS if full else BWD_ONE_PIECE):
            for kernel, shape in (norm.forward(block), norm.backward(block, x_bias=full)):
                case = f"C={block} {'full' if full else 'plain'}"
                yield _configuration(norm, kernel, shape, case, types, quick_width(block))
    kernel, shape = norm.backward(BWD_ONE_PIECE, x_bias=False)
    if kernel is not norm.backward(BWD_ONE_PIECE, x_bias=True)[0]:
        types = _types(dtype, w, True) | {"X_BIAS": False}
        yield _configuration(norm, kernel, shape, f"C={BWD_ONE_PIECE} no x_bias", types, False)
    sums, f32 = "dweight, dbias and dx_bias" if norm.mean else "dweight and dx_bias", torch.float32
    meta, warps = split_meta({**partials_meta(), "MEAN": norm.mean})
    types = pointers(dy_ptr=dtype, h_ptr=dtype, stats_ptr=f32, dx_ptr=dtype, partials_ptr=f32)
    types |= dict.fromkeys(("dy_row", "h_row", "N", "C"), "i32")
    yield Configuration(norm_partials_wide_kernel, f"C=16384 {sums}", types, warps, meta)
    yield add_partials_configuration(sums, w, *((w,) if norm.mean else ()), dtype)


def _configuration(norm: Norm, kernel: Any, shape: Meta, case: str, types: Types, quick: bool) -> Configuration:
    """Return the configuration of a kernel of the norm; `types` has arguments of all its kernels."""
    meta, warps = split_meta(shape)
    arguments = {name: types[name] for name in kernel.arg_names if name in types}
    programs = programs_of(shape) if kernel is norm.bwd else None
    return Configuration(kernel, case, arguments, warps, meta, programs=programs, quick=quick)


def _types(dtype: torch.dtype, weight_dtype: torch.dtype, full: bool) -> Types:
    """Return the signature types of all arguments of the kernels in a Norm, by name."""
    option, weight, partials = (dtype, weight_dtype, torch.float32) if full else (None, None, None)
    types: Types = pointers(**dict.fromkeys(("x_ptr", "y_ptr", "dy_ptr", "h_ptr", "dx_ptr"), dtype))
    types |= pointers(**dict.fromkeys(("residual_ptr", "x_bias_ptr", "sum_ptr", "dsum_ptr"), option))
    types |= pointers(**dict.fromkeys(("stats_ptr", "rstd_ptr"), torch.float32))
    types |= pointers(weight_ptr=weight, bias_ptr=weight, partials_ptr=partials)
    types |= dict.fromkeys(("x_row", "residual_row", "dy_row", "dsum_row", "h_row", "N", "C"), "i32")
    return types | dict.fromkeys(("eps", "weight_offset"), "fp32")
