"""Launch shapes of the attention kernels by head dimension, dtype, options and shared memory of the chip.

These shapes compile without spills and with tensor cores for sm_80, 86, 89 and 90 (fastgpt/checks/triton.py). Some were
chosen by modelled time (docs/step-budget.md), none by timing yet.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ._attention import CAUSAL
from ._runtime import TRITON, ceil_pow2, interpreted

RANGE_BLOCK, CHUNK = 64, 1024  # queries per block of attention_ranges_kernel; elements per step of its scans
DELTA_TILE = 2048  # elements per program of attention_delta_kernel, 16 per thread: more spill where strides are odd

# BLOCK_M queries, BLOCK_N keys, warps, stages, and a limit of registers per thread if one more program then fits a
# multiprocessor.
Tile = tuple[int, ...]
Tiles = dict[str, dict[int, Tile]]  # kernel -> largest head dimension -> tile
PLAIN: dict[int, Tiles] = {  # shared memory in KB -> tiles of 16 bits with no mask but causal order
    227: {
        "fwd": {64: (128, 64, 8, 3, 128), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
        "dkdv": {64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (32, 32, 8, 2)},
        "dq": {64: (128, 64, 8, 2, 128), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
    },
    163: {
        "fwd": {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
        "dkdv": {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
        "dq": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
    },
    99: {
        "fwd": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        "dkdv": {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
        "dq": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (32, 32, 8, 2)},
    },
}
OPTIONS: dict[int, Tiles] = {  # with a window, ranges, documents, softcap or dropout
    227: {
        "fwd": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        "dkdv": {64: (32, 128, 8, 2), 128: (32, 32, 8, 2), 256: (32, 32, 8, 2)},
        "dq": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
    },
    163: {
        "fwd": {64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
        "dkdv": {64: (32, 32, 4, 2), 128: (32, 32, 8, 2), 256: (32, 32, 8, 2)},
        "dq": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
    },
}
OPTIONS[99] = {
    **OPTIONS[163],
    "dkdv": {**OPTIONS[163]["dkdv"], 64: (32, 32, 8, 2)},
    "dq": {**OPTIONS[163]["dq"], 256: (32, 32, 8, 2)},
}
if TRITON >= (3, 7):  # two programs on a multiprocessor, not one; with fewer than 64 columns they would spill 8 bytes
    PLAIN[163]["dkdv"] = {56: (32, 128, 8, 2), 64: (32, 64, 4, 2), 128: (32, 32, 4, 2), 256: (32, 32, 8, 2)}
if TRITON == (3, 7):  # the same; 3.9 would spill 8 bytes
    PLAIN[163]["dq"][64] = (64, 64, 4, 2)
if TRITON < (3, 7):  # (128, 64, 8, 2) would spill 8 bytes
    OPTIONS[163]["dq"][64] = (128, 32, 8, 2)
if TRITON >= (3, 9):  # it allocates more registers, and the tiles above would spill 8 to 240 bytes
    PLAIN[227]["fwd"][64] = (128, 64, 4, 3)
    for kb in (163, 99):
        PLAIN[kb]["fwd"][128] = (128, 32, 8, 3)
    OPTIONS[227]["fwd"][256] = (32, 32, 4, 2)
    for kb in OPTIONS:
        OPTIONS[kb]["dq"][256] = (32, 32, 4, 2)
FLOAT32: Tiles = {  # any options and chip; exact products run outside the tensor cores
    "fwd": {64: (32, 32, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)},
    "dkdv": {64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    "dq": {64: (32, 32, 8, 1), 128: (32, 16, 8, 1), 256: (32, 16, 8, 1)},
}
CHIPS = {227: (90,), 163: (80,), 99: (86, 89)}  # for the ahead-of-time check


def tiled(x: Tensor) -> Tensor:
    """Return x (B, T, H, D), or a copy whose rows are padded with zeros to 16 bytes.

    x itself is returned if its rows are contiguous, start at multiples of 16 bytes and are close enough to address a
    tile with 32 bits.
    """
    unit, strides = 16 // x.element_size(), x.stride()
    if x.shape[3] % unit:
        return torch.nn.functional.pad(x, (0, -x.shape[3] % unit))
    aligned = x.data_ptr() % 16 == 0 and all(n == 1 or s % unit == 0 for n, s in zip(x.shape[:3], strides))
    fits = aligned and strides[3] == 1 and strides[1] < 2**22
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def columns(D: int) -> int:
    """Return BLOCK_D, the power of two that holds a head dimension; tl.dot needs at least 16."""
    return max(16, ceil_pow2(D))


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return the class of a chip: the largest KB of shared memory that it has and that the tables contain."""
    if interpreted():
        return 99
    properties: Any = torch.cuda.get_device_properties(device)
    found = properties.shared_memory_per_block_optin // 1024
    return next((kb for kb in PLAIN if found >= kb), 99)


def options_on(o: dict[str, Any]) -> bool:
    """Return whether a launch has more options than causal order."""
    return o["RANGE"] > CAUSAL.value or o["DOCS"] or o["SOFTCAP"] or o["DROPOUT"]


@functools.cache
def tile(kernel: str, D: int, dtype: torch.dtype, options: bool, kb: int) -> dict[str, Any]:
    """Return the launch shape of one kernel; in the interpreter, few and large programs."""
    if interpreted():
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}
    table = FLOAT32 if dtype == torch.float32 else (OPTIONS if options else PLAIN)[kb]
    m, n, warps, stages, *registers = next(t for size, t in table[kernel].items() if D <= size)
    shape = {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    return {**shape, "maxnreg": registers[0]} if registers else shape
