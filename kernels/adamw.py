"""AdamW of all tensors in two launches: gradient norm, then unscale, clip, decay, update and write-back.

    g = grad / grad_scale * min(1, max_norm / (norm + 1e-6)),  norm = sqrt(sum over all tensors of grad^2) / grad_scale
    t = steps[index],  p *= 1 - lr wd,  m += (1 - b1) (g - m),  v = b2 v + (1 - b2) g^2
    p -= lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

Loshchilov, Hutter 2019 (arXiv:1711.05101). fp32 maths on fp32 or bf16 moments. Parameters: fp32, or 16-bit with an fp32
master, with the master's low 16 bits (bf16; exact), rounded stochastically (bf16), or rounded to nearest.
1 - b^t cancels in fp32 where b^t is near 1; -expm1(t log b) with log b rounded once from double does not (2e-7).
A parameter that is not the rounding of its fp32 master was set from outside, so it is copied to the master first.
Bytes an element, bf16 with fp32 master and moments: 2 (norm) + 30. No synchronisation with the host.

Addresses, sizes and hyperparameters are passed as tables on the device, cached by their content, so an unchanged set of
tensors uploads nothing. During the capture of a CUDA graph a cached table is used as it is. Gradients that moved into
the memory of the graph need a new table; its upload, from pinned memory that was set aside, is captured as a copy and
never reused. If found_inf is set or the norm is not finite, the update is skipped and the step of prepare is undone.
Deterministic: every program adds the same partial sums in the same order, without atomics.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._runtime import (
    TYPES,
    Configuration,
    cast,
    exp,
    interpreted,
    jit_kernel,
    on_device,
    pointers,
    processors,
    split_meta,
)
from ._tables import Tables

CHUNK = 4096  # elements per program at a time, all of one tensor
# update: 4 elements per thread give 16- and 32-bit tensors one layout; more need conversions through shared memory
UPDATE = {"BLOCK": CHUNK if interpreted() else 512, "num_warps": 4}
PREPARE = {"BLOCK": CHUNK if interpreted() else 2048, "num_warps": 8}
MAX_PARTIALS = 4 if interpreted() else 1024  # partial sums of one prepare; every program of update reads them all
SUM_BLOCK = 1024
MASTERS = {None: 0, torch.float32: 1, torch.int16: 2}
STOCHASTIC = 3
# columns of the table of tensors
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MASTER, NUMEL, FIRST_CHUNK, SLOT, GROUP, COLUMNS = (
    tl.constexpr(i) for i in range(10)
)
# columns of the table of groups
LOG_BETA1, LOG_BETA2, ONE_MINUS_BETA1, BETA2, ONE_MINUS_BETA2, EPS, DECAY, GROUP_COLUMNS = (
    tl.constexpr(i) for i in range(8)
)


@triton.jit
def _pointer(table_ptr, tensor, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the address in one column of the table of tensors."""
    p = tl.load(table_ptr + tensor * COLUMNS + column).to(tl.pointer_type(dtype))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def _size(table_ptr, tensor, ALIGNED: tl.constexpr):
    """Return the number of elements of a tensor; a known multiple of 16 allows vector loads under a mask."""
    numel = tl.load(table_ptr + tensor * COLUMNS + NUMEL)
    if ALIGNED:
        numel = tl.multiple_of(numel, 16)
    return numel


@triton.jit
def _one_minus_power(log_beta, t):
    """Return 1 - beta^t = -expm1(t log beta), relative error 2e-7: a polynomial near 0, where 1 - exp cancels."""
    x = log_beta * t
    near = 0.008325044065713882 + x * (0.0013637071242555976 + x * 0.0001599568931851536)
    near = x + x * x * (0.5 + x * (0.16666655242443085 + x * (0.041665270924568176 + x * near)))
    return tl.where(x > -0.5, -near, 1.0 - exp(x))


@triton.jit
def _mix(x):
    """Return a bijective hash of 32 bits (two multiply-xorshift rounds)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _round_stochastic(p, key, element):
    """Round fp32 to bf16 bits (int16), up with the probability of the dropped fraction; keep infinities and NaN."""
    bits = p.to(tl.uint32, bitcast=True)
    key += (element >> 32).to(tl.uint32) * 0x9E3779B9
    noise = _mix(_mix(key ^ (element & 0xFFFFFFFF).to(tl.uint32)) + key) & 0xFFFF
    finite = (bits & 0x7F800000) != 0x7F800000
    bits = tl.where(finite, bits + noise, tl.where(p == p, bits, 0x7FC00000))
    return (bits >> 16).to(tl.uint16).to(tl.int16, bitcast=True)


@jit_kernel(do_not_specialize=["n_tensors", "n_chunks", "offset"])
def adamw_prepare_kernel(
    table_ptr,  # (n_tensors, COLUMNS) int64
    chunks_ptr,  # (n_chunks) int32: the tensor of each chunk
    steps_ptr,  # fp32
    partials_ptr,  # fp32
    n_tensors, n_chunks, offset, NORM: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add 1 to steps; program p writes the sum of squares of chunks p, p + programs, ..."""
    pid = tl.program_id(0)
    _add_to_steps(table_ptr, steps_ptr, n_tensors, 1.0)
    if NORM:
        acc = tl.zeros([BLOCK], tl.float32)
        for chunk in range(pid, n_chunks, tl.num_programs(0)):
            tensor = tl.load(chunks_ptr + chunk).to(tl.int64)
            numel = _size(table_ptr, tensor, ALIGNED)
            begin = (chunk - tl.load(table_ptr + tensor * COLUMNS + FIRST_CHUNK)) * CHUNK
            grad_ptr = _pointer(table_ptr, tensor, GRAD, DTYPE, ALIGNED)
            for start in range(0, CHUNK, BLOCK):
                i = begin + start + tl.arange(0, BLOCK)
                g = tl.load(grad_ptr + i, i < numel, other=0.0).to(tl.float32)
                acc += g * g
        tl.store(partials_ptr + offset + pid, tl.sum(acc, axis=0))


@triton.jit
def _add_to_steps(table_ptr, steps_ptr, n_tensors, value):
    """Add value to steps[slot] of every tensor; 256 tensors per program at a time."""
    for start in range(tl.program_id(0) * 256, n_tensors, tl.num_programs(0) * 256):
        i = start + tl.arange(0, 256)
        slot = tl.load(table_ptr + i * COLUMNS + SLOT, i < n_tensors, other=0)
        tl.store(steps_ptr + slot, tl.load(steps_ptr + slot, i < n_tensors, other=0.0) + value, i < n_tensors)


@triton.jit
def _gradient_factor(
    partials_ptr, n_partials, max_norm, grad_scale_ptr, found_inf_ptr, grad_norm_ptr, SUM_BLOCK: tl.constexpr
):
    """Return the factor of the gradients (1 / grad_scale and clipping) and whether this step is skipped."""
    factor = 1.0
    skip = n_partials < 0  # False, as a tensor
    if grad_scale_ptr is not None:
        factor = tl.div_rn(1.0, tl.load(grad_scale_ptr))
    if found_inf_ptr is not None:
        skip = tl.load(found_inf_ptr) != 0.0
    if n_partials > 0:
        acc = tl.zeros([SUM_BLOCK], tl.float32)
        for start in range(0, n_partials, SUM_BLOCK):
            i = start + tl.arange(0, SUM_BLOCK)
            acc += tl.load(partials_ptr + i, i < n_partials, other=0.0)
        norm = tl.sqrt_rn(tl.sum(acc, axis=0)) * factor
        if tl.program_id(0) == 0:
            tl.store(grad_norm_ptr, norm)
        skip = skip | ((norm < float("inf")) == 0)
        if max_norm > 0:
            factor *= tl.minimum(1.0, tl.div_rn(max_norm, norm + 1e-6))
    return factor, skip


@triton.jit
def _load_param(table_ptr, tensor, i, mask, PARAM_TYPE: tl.constexpr, MODE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the fp32 value of the parameters: the parameter, its master, or its bits above those of the remainder."""
    if MODE == 1:
        master = tl.load(_pointer(table_ptr, tensor, MASTER, tl.float32, ALIGNED) + i, mask, other=0.0)
        p = tl.load(_pointer(table_ptr, tensor, PARAM, PARAM_TYPE, ALIGNED) + i, mask, other=0.0).to(tl.float32)
        return tl.where(cast(master, PARAM_TYPE).to(tl.float32) == p, master, p)
    elif MODE == 2:
        high = tl.load(_pointer(table_ptr, tensor, PARAM, tl.int16, ALIGNED) + i, mask, other=0).to(tl.int32)
        low = tl.load(_pointer(table_ptr, tensor, MASTER, tl.int16, ALIGNED) + i, mask, other=0).to(tl.int32)
        low = tl.where(((high & 0x7FFF) == 0) & (low < 0), 0, low)  # a zero set from outside would become NaN
        return ((high << 16) + low).to(tl.float32, bitcast=True)
    else:
        return tl.load(_pointer(table_ptr, tensor, PARAM, PARAM_TYPE, ALIGNED) + i, mask, other=0.0).to(tl.float32)


@triton.jit
def _store_param(
    p, table_ptr, tensor, i, mask, key, PARAM_TYPE: tl.constexpr, MODE: tl.constexpr, ALIGNED: tl.constexpr
):
    """Store the fp32 value p: rounded, with its master or remainder, or rounded stochastically."""
    if MODE == 2:
        bits = tl.where(p == p, p.to(tl.int32, bitcast=True), 0x7FC00000)  # the NaN of the GPU would round to -0
        high = (bits + 0x8000) >> 16
        tl.store(_pointer(table_ptr, tensor, PARAM, tl.int16, ALIGNED) + i, high.to(tl.int16), mask)
        tl.store(_pointer(table_ptr, tensor, MASTER, tl.int16, ALIGNED) + i, (bits - (high << 16)).to(tl.int16), mask)
    elif MODE == 3:
        tl.store(_pointer(table_ptr, tensor, PARAM, tl.int16, ALIGNED) + i, _round_stochastic(p, key, i), mask)
    else:
        tl.store(_pointer(table_ptr, tensor, PARAM, PARAM_TYPE, ALIGNED) + i, cast(p, PARAM_TYPE), mask)
        if MODE == 1:
            tl.store(_pointer(table_ptr, tensor, MASTER, tl.float32, ALIGNED) + i, p, mask)


@jit_kernel(do_not_specialize=["n_tensors", "n_chunks", "n_partials", "max_norm", "seed_low", "seed_high"])
def adamw_update_kernel(
    table_ptr,  # (n_tensors, COLUMNS) int64
    chunks_ptr,  # (n_chunks) int32: the tensor of each chunk
    groups_ptr,  # (n_groups, GROUP_COLUMNS) fp32
    lr_ptr,  # (n_groups) fp32
    steps_ptr,  # fp32
    partials_ptr,  # (n_partials) fp32
    grad_scale_ptr,  # (1) fp32 or None
    found_inf_ptr,  # (1) fp32 or None
    grad_norm_ptr,  # (1) fp32
    n_tensors, n_chunks, n_partials, max_norm, seed_low, seed_high,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, MOMENT_TYPE: tl.constexpr,
    MODE: tl.constexpr,  # 0 no master, 1 fp32 master, 2 remainder, 3 stochastic rounding
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, SUM_BLOCK: tl.constexpr,
):  # fmt: skip
    """Update chunks p, p + programs, ... in program p."""
    factor, skip = _gradient_factor(
        partials_ptr, n_partials, max_norm, grad_scale_ptr, found_inf_ptr, grad_norm_ptr, SUM_BLOCK
    )
    if skip:
        _add_to_steps(table_ptr, steps_ptr, n_tensors, -1.0)
    n_chunks = tl.where(skip, 0, n_chunks)
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        tensor = tl.load(chunks_ptr + chunk).to(tl.int64)
        row = table_ptr + tensor * COLUMNS
        numel = _size(table_ptr, tensor, ALIGNED)
        begin = (chunk - tl.load(row + FIRST_CHUNK)) * CHUNK
        slot = tl.load(row + SLOT)
        group = tl.load(row + GROUP)
        t = tl.load(steps_ptr + slot)
        lr = tl.load(lr_ptr + group)
        g_row = groups_ptr + group * GROUP_COLUMNS
        one_minus_beta1 = tl.load(g_row + ONE_MINUS_BETA1)
        beta2 = tl.load(g_row + BETA2)
        one_minus_beta2 = tl.load(g_row + ONE_MINUS_BETA2)
        eps = tl.load(g_row + EPS)
        keep = 1.0 - lr * tl.load(g_row + DECAY)
        step_size = tl.div_rn(lr, _one_minus_power(tl.load(g_row + LOG_BETA1), t))
        v_factor = tl.div_rn(1.0, tl.sqrt_rn(_one_minus_power(tl.load(g_row + LOG_BETA2), t)))
        key = _mix(_mix(_mix(seed_low.to(tl.uint32)) + seed_high.to(tl.uint32)) + t.to(tl.uint32))
        key = _mix(key + slot.to(tl.uint32))
        m_ptr = _pointer(table_ptr, tensor, EXP_AVG, MOMENT_TYPE, ALIGNED)
        v_ptr = _pointer(table_ptr, tensor, EXP_AVG_SQ, MOMENT_TYPE, ALIGNED)
        grad_ptr = _pointer(table_ptr, tensor, GRAD, GRAD_TYPE, ALIGNED)
        for start in range(0, CHUNK, BLOCK):
            i = begin + start + tl.arange(0, BLOCK)
            mask = i < numel
            g = tl.load(grad_ptr + i, mask, other=0.0).to(tl.float32) * factor
            m = tl.load(m_ptr + i, mask, other=0.0).to(tl.float32)
            v = tl.load(v_ptr + i, mask, other=0.0).to(tl.float32)
            p = _load_param(table_ptr, tensor, i, mask, PARAM_TYPE, MODE, ALIGNED)
            m += one_minus_beta1 * (g - m)
            v = beta2 * v + one_minus_beta2 * g * g
            p = p * keep - step_size * m / (tl.sqrt(v) * v_factor + eps)
            tl.store(m_ptr + i, cast(m, MOMENT_TYPE), mask)
            tl.store(v_ptr + i, cast(v, MOMENT_TYPE), mask)
            _store_param(p, table_ptr, tensor, i, mask, key, PARAM_TYPE, MODE, ALIGNED)


_tables: dict[torch.device, Tables] = {}


def _n_chunks(numels: Sequence[int]) -> int:
    return sum(triton.cdiv(n, CHUNK) for n in numels)


def adamw_partials(numels: Sequence[int]) -> int:
    """Return how many partial sums prepare writes for tensors of these sizes."""
    return max(1, min(MAX_PARTIALS, _n_chunks(numels))) if len(numels) else 0


def _chunk_map(numels: tuple[int, ...]) -> tuple[Tensor, int]:
    """Return the tensor of each chunk, and the number of chunks."""
    counts = torch.tensor([triton.cdiv(n, CHUNK) for n in numels], device="cpu")  # regardless of the default device
    of_chunk = torch.repeat_interleave(torch.arange(len(numels), dtype=torch.int32, device="cpu"), counts)
    return of_chunk, of_chunk.numel()


def _tensor_table(addresses: Sequence[tuple[int, ...]], rest: Sequence[tuple[int, ...]]) -> tuple[Tensor, bool]:
    """Return the table of tensors and whether addresses and sizes are multiples of 16. rest: numels, index, group."""
    numels, index, group = rest
    first = [0, *itertools.accumulate(triton.cdiv(n, CHUNK) for n in numels)][:-1]
    columns = [*(a or (0,) * len(numels) for a in addresses), numels, first, index, group]
    aligned = all(a % 16 == 0 for column in (*addresses, numels) for a in column)
    return torch.tensor(columns, device="cpu").T.contiguous(), aligned


def _upload(
    lists: Sequence[Sequence[Tensor]], index: Sequence[int], group: Sequence[int]
) -> tuple[Tensor, bool, Tensor, int]:
    """Upload the tables of params, grads, exp_avgs, exp_avg_sqs and masters.

    Returns:
        The table of tensors, whether all are aligned, the table of chunks, and the number of chunks.
    """
    device = lists[1][0].device
    tables = _tables.setdefault(device, Tables(device))
    addresses = tuple(tuple(t.data_ptr() for t in column) for column in lists)
    numels = tuple(t.numel() for t in lists[1])
    rest = (numels, tuple(index), tuple(group) or (0,) * len(numels))
    chunks, n_chunks = tables.get(("chunks", numels), lambda: _chunk_map(numels))
    table, aligned = tables.get((addresses, rest), lambda: _tensor_table(addresses, rest), moves=True)
    return table, aligned, chunks, n_chunks


def _group_table(groups: Sequence[tuple[float, float, float, float]]) -> tuple[Tensor, None]:
    """Return the constants of the update for each group, computed in double and rounded once."""
    rows = [(_log(b1), _log(b2), 1 - b1, b2, 1 - b2, eps, decay) for b1, b2, eps, decay in groups]
    return torch.tensor(rows, dtype=torch.float64, device="cpu").to(torch.float32), None


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def adamw_prepare(
    grads: list[Tensor], steps: Tensor, index: list[int], partials: Tensor, offset: int, norm: bool
) -> None:
    """Count a step of every tensor; with `norm` write adamw_partials() sums of squares from partials[offset] on."""
    if not grads:
        return
    table, aligned, chunks, n_chunks = _upload(((), grads, (), (), ()), index, ())
    programs = max(1, min(MAX_PARTIALS, n_chunks)) if norm else 1
    with on_device(steps):
        adamw_prepare_kernel[(programs,)](
            table, chunks, steps, partials, len(grads), n_chunks, offset, NORM=norm, DTYPE=TYPES[grads[0].dtype],
            ALIGNED=aligned, CHUNK=CHUNK, **PREPARE,
        )  # fmt: skip


def adamw_update(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    masters: list[Tensor], steps: Tensor, index: list[int], group: list[int], lr: Tensor, beta1: list[float],
    beta2: list[float], eps: list[float], weight_decay: list[float], partials: Tensor, max_norm: float,
    grad_scale: Tensor | None, found_inf: Tensor | None, grad_norm: Tensor, stochastic: bool, seed: int,
) -> None:  # fmt: skip
    """Run one AdamW step of all tensors in place; the head of this file describes norm, clipping and skipping."""
    if not params:
        return
    table, aligned, chunks, n_chunks = _upload((params, grads, exp_avgs, exp_avg_sqs, masters), index, group)
    groups = tuple(zip(beta1, beta2, eps, weight_decay, strict=True))
    constants, _ = _tables[steps.device].get(("groups", groups), lambda: _group_table(groups))
    programs = max(1, min(n_chunks, 8 * processors(steps.device)))
    with on_device(steps):
        adamw_update_kernel[(programs,)](
            table, chunks, constants, lr, steps, partials, grad_scale, found_inf, grad_norm, len(params), n_chunks,
            partials.numel(), max_norm, _int32(seed), _int32(seed >> 32),
            **_types(params, grads, exp_avgs, masters, stochastic), ALIGNED=aligned, CHUNK=CHUNK, SUM_BLOCK=SUM_BLOCK,
            **UPDATE,
        )  # fmt: skip


def _types(
    params: list[Tensor], grads: list[Tensor], moments: list[Tensor], masters: list[Tensor], stochastic: bool
) -> dict[str, object]:
    """Return the compile-time types of the kernel and the mode in which it stores parameters."""
    dtype = params[0].dtype
    mode = MASTERS[masters[0].dtype if masters else None]
    if not masters and stochastic and dtype == torch.bfloat16:
        mode = STOCHASTIC
    types = {"PARAM_TYPE": TYPES[dtype], "GRAD_TYPE": TYPES[grads[0].dtype], "MOMENT_TYPE": TYPES[moments[0].dtype]}
    return {**types, "MODE": mode}


def _int32(x: int) -> int:
    """Return the low 32 bits as a signed number, so the type of the argument does not depend on its value."""
    return ((x & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def configurations(dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Iterator[Configuration]:
    """Yield every mode of storing parameters of this dtype, with gradients of either dtype and fp32 or bf16 moments."""
    f32, i64, sizes = torch.float32, torch.int64, {"n_tensors": "i32", "n_chunks": "i32"}
    tables = pointers(table_ptr=i64, chunks_ptr=torch.int32, steps_ptr=f32, partials_ptr=f32)
    prepare, update = split_meta(PREPARE), split_meta(UPDATE)
    modes = {"no master": 0, "fp32 master": 1} | ({"remainder": 2, "stochastic": 3} if dtype == torch.bfloat16 else {})
    seeds = {"n_partials": "i32", "max_norm": "fp32", "seed_low": "i32", "seed_high": "i32"}
    for aligned in (True, False):
        for norm in (True, False):
            flags = {**prepare[0], "CHUNK": CHUNK, "NORM": norm, "DTYPE": TYPES[dtype], "ALIGNED": aligned}
            case = f"norm={norm} ALIGNED={aligned}"
            yield Configuration(adamw_prepare_kernel, case, {**tables, **sizes, "offset": "i32"}, prepare[1], flags)
        for (name, mode), grad, moment in itertools.product(modes.items(), {dtype, f32}, (f32, torch.bfloat16)):
            extra = pointers(groups_ptr=f32, lr_ptr=f32, grad_norm_ptr=f32, grad_scale_ptr=f32, found_inf_ptr=f32)
            types = {"PARAM_TYPE": TYPES[dtype], "GRAD_TYPE": TYPES[grad], "MOMENT_TYPE": TYPES[moment]}
            flags = {**update[0], **types, "CHUNK": CHUNK, "SUM_BLOCK": SUM_BLOCK, "MODE": mode, "ALIGNED": aligned}
            quick = (grad, moment) == ((dtype, f32) if aligned else (f32, torch.bfloat16))  # no options, all options
            case = f"{name} grad={TYPES[grad]} moments={TYPES[moment]} ALIGNED={aligned}"
            arguments = {**tables, **extra, **sizes, **seeds}
            yield Configuration(adamw_update_kernel, case, arguments, update[1], flags, quick=quick)
